"""Pack fine-tuned clinical language models: base weights and a LoRA adapter to GGUF and Ollama.

The package is layered, and imports go downward only:

    cli                     options -> one call -> output; the only place that prints or exits
    publish                 registries, the Hub, bundles, signatures, and the ways back
    parity                  is it still the same model?
    pack                    plan what will be written, stream it, describe it (pack.json, card)
    ollama                  Modelfile styles, the Modelfile that a pack ships, Ollama's store
    quant                   which tensor gets which type, and the bytes of each block
    gguf                    names, metadata, vocabulary and layout of the files
    weights                 checkpoints and adapters as rows on demand
    recipe, errors, files, progress, …

As a library (docs/library.md): :func:`medllm_pack.pack.plan.make_plan`,
:func:`medllm_pack.pack.build.build`, :func:`medllm_pack.parity.run.check_pack`,
:func:`medllm_pack.publish.verify.verify_pack` and their neighbours. They print nothing, end no
process and set no signal handler; what goes wrong is a :class:`medllm_pack.errors.MedllmError`.
"""

__version__ = "0.1.0"
