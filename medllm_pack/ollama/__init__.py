"""Ollama: Modelfile styles and names."""
