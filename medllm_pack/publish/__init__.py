"""From a pack to the people who run it: registries, the Hub, a bundle, and the way back."""
