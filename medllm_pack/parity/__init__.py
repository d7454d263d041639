"""Running what was built: llama.cpp, and later the comparison with the original."""
