"""The main job: plan, build, and the papers of a pack."""
