"""From a pack to the people who run it: registries, the Hub, a bundle for a stick, and the way back."""
