"""What other programs made of our pico models, kept as digests."""
