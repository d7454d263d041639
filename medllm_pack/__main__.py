"""``python -m medllm_pack`` is ``medllm-pack``."""

from medllm_pack.cli.app import main

main()
