"""Pack fine-tuned clinical language models: base weights and a LoRA adapter to GGUF and Ollama.

The package is layered, and imports go downward only:

    cli                     options -> one call -> output; the only place that prints or exits
    pack                    plan what will be written, stream it, describe it (pack.json, card)
    ollama                  Modelfile styles and the Modelfile that a pack ships
    quant                   which tensor gets which type, and the bytes of each block
    gguf                    names, metadata, vocabulary and layout of the files
    weights                 checkpoints and adapters as rows on demand
    errors, files, progress, resources

Use it as a library through :func:`medllm_pack.pack.plan.make_plan` and
:func:`medllm_pack.pack.build.build`.
"""

__version__ = "0.1.0"
