"""How plans, packs and files look: tables for people, documents for --json."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllm_pack.cli.console import Output

if TYPE_CHECKING:
    from medllm_pack.gguf.reader import GGUFFile
    from medllm_pack.pack.build import Built
    from medllm_pack.pack.plan import Plan
    from medllm_pack.publish.transport import Access

_LONG = 8  # items of an array that are shown without -v


def built(output: Output, plan: Plan, result: Built) -> None:
    """Show a finished pack and the next command."""
    from medllm_pack.pack.card import human_bytes

    rows = [
        (
            variant["quant"], human_bytes(variant["size"]), f"{variant['bits_per_weight']:.2f}",
            _histogram(variant["types"]), f"sha256:{variant['sha256'][:12]}",
        )
        for variant in result.manifest["variants"]
    ]  # fmt: skip
    output.table(("variant", ">size", ">bits/weight", "types", "digest"), rows)
    if plan.adapter is not None:
        n, pairs = plan.adapter_tensors, plan.adapter_pairs
        output.line(f"adapter: all {n} tensors used, {pairs} matrices changed")
    last = plan.files[-1]
    output.line(f"\n{result.folder} is ready. Next:")
    output.line(f"  ollama create {plan.recipe.ollama} -f {result.folder / last.modelfile}")


def inputs(output: Output, plan: Plan) -> None:
    """Show where the weights come from (on standard error, before the work)."""
    import sys

    copies = [(plan.inputs.role, plan.inputs.model), ("adapter", plan.inputs.adapter)]
    for role, copy in copies:
        if copy is not None and not output.json:
            print(f"{role}: {copy.source} {copy.revision or ''}".rstrip(), file=sys.stderr)


def plan_document(plan: Plan, *, threads: int | None) -> dict[str, Any]:
    """Return a plan as --json shows it."""
    from medllm_pack.files import disk_free

    return {
        "name": plan.name,
        "out": str(plan.request.out),
        "variants": [
            {
                "quant": file.quant, "file": file.file, "size": file.layout.size,
                "bits_per_weight": round(file.layout.bits_per_weight, 4),
                "types": file.layout.types,
            }
            for file in plan.files
        ],
        "parameters": plan.files[0].layout.parameters,
        "read_bytes": plan.bytes_to_read,
        "download_bytes": sum(plan.inputs.model.remote.values()),
        "write_bytes": plan.bytes_to_write,
        "disk_free_bytes": disk_free(plan.request.out),
        "memory_bytes": _memory(plan, threads),
        "license": {"id": plan.recipe.license.id, "missing": list(plan.open_duties)},
        "deviations": list(plan.deviations),
        "notices": list(plan.notices),
    }  # fmt: skip


def planned(output: Output, plan: Plan, *, threads: int | None) -> None:
    """Show what a build would do and need."""
    from medllm_pack.gguf.llama import size_label
    from medllm_pack.pack.card import human_bytes

    document = plan_document(plan, threads=threads)
    output.line(
        f"{plan.name} · {size_label(document['parameters'])} parameters -> {document['out']}\n"
    )
    rows = [
        (
            v["quant"], human_bytes(v["size"]), f"{v['bits_per_weight']:.2f}",
            _histogram(v["types"]), v["file"],
        )
        for v in document["variants"]
    ]  # fmt: skip
    output.table(("variant", ">size", ">bits/weight", "types", "file"), rows)
    output.line()
    if document["download_bytes"]:
        output.line(f"download {human_bytes(document['download_bytes'])}")
    output.line(f"read     {human_bytes(document['read_bytes'])}, every weight once")
    free = human_bytes(document["disk_free_bytes"])
    output.line(f"write    {human_bytes(document['write_bytes'])} ({free} free)")
    output.line(f"memory   about {human_bytes(document['memory_bytes'])}")
    missing = document["license"]["missing"]
    texts = f"; missing: {', '.join(missing)}" if missing else ""
    output.line(f"licence  {plan.recipe.license.name} ({plan.recipe.license.id}){texts}")
    for text in (*plan.deviations, *plan.notices):
        output.line(f"note: {text}")


def gguf_document(header: GGUFFile) -> dict[str, Any]:
    """Return a GGUF file as --json shows it; long arrays by their length."""
    return {
        "summary": headline(header),
        "parameters": header.parameters,
        "size": header.size,
        "types": _types(header),
        "metadata": {
            key: {"items": len(value)} if isinstance(value, tuple) and len(value) > _LONG else value
            for key, value in header.metadata.items()
        },
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "type": t.type, "offset": t.offset}
            for t in header.tensors
        ],
    }


def remote(output: Output, reference: str, access: Access) -> None:
    """Show what a registry has under a reference; of the weights only the header is fetched."""
    from medllm_pack.errors import UsageError
    from medllm_pack.gguf.reader import read_header
    from medllm_pack.publish.pull import remote_weights
    from medllm_pack.publish.targets import RegistryTarget, parse_target

    target = parse_target(reference)
    if not isinstance(target, RegistryTarget):
        raise UsageError("inspect reads oci:// and ollama:// references; pull the others first")
    with remote_weights(target, access) as (head, weights, file):
        header = read_header(file, size=weights.size, name=str(weights.digest))
    digests = {"manifest": str(head.image.digest), "weights": str(weights.digest)}

    def show() -> None:
        gguf_file(output, header)
        output.line(f"\nmanifest {digests['manifest']}\nweights  {digests['weights']}")

    output.result(gguf_document(header) | {"digests": digests}, show)


def headline(header: GGUFFile) -> str:
    """Return what stands at the top of a model page: ``llama · 6.74B · F16 · 13 GB``."""
    from gguf import Keys, LlamaFileType

    from medllm_pack.gguf.llama import size_label
    from medllm_pack.pack.card import human_bytes

    number = header.metadata.get(Keys.General.FILE_TYPE)
    known = {int(kind): kind.name.partition("_")[2] for kind in LlamaFileType}
    parts = (
        str(header.metadata.get(Keys.General.ARCHITECTURE, "unknown")),
        size_label(header.parameters),
        known.get(number, "unknown type") if isinstance(number, int) else "unknown type",
        human_bytes(header.size),
    )
    return " · ".join(parts)


def gguf_file(output: Output, header: GGUFFile) -> None:
    """Show a GGUF file."""
    output.line(headline(header) + "\n")
    rows = [(key, _shown(value, output.verbose)) for key, value in header.metadata.items()]
    output.table(("key", "value"), rows)
    output.line(f"\n{len(header.tensors)} tensors: {_histogram(_types(header))}")
    if output.verbose:
        output.line()
        output.table(
            ("tensor", "shape", "type", ">offset"),
            [
                (t.name, " × ".join(map(str, t.shape)), t.type, str(t.offset))
                for t in header.tensors
            ],
        )


def pack(output: Output, folder: Path, document: dict[str, Any]) -> None:
    """Show a pack."""
    from medllm_pack.gguf.reader import read_gguf

    output.line(f"{document['name']}\n")
    rows = [
        (v["quant"], headline(read_gguf(folder / v["file"])), _histogram(v["types"]),
         f"sha256:{v['sha256'][:12]}")
        for v in document["variants"]
    ]  # fmt: skip
    output.table(("variant", "file", "types", "digest"), rows)
    output.line()
    for entry in document["inputs"]:
        revision = f"@{entry['revision']}" if entry["revision"] else ""
        output.line(f"{entry['role']:9}{entry['source']}{revision}")
    output.line(f"template {document['template']['name']}")
    missing = document["license"]["missing"]
    output.line(
        f"licence  {document['license']['id']}"
        + (f"; missing: {', '.join(missing)}" if missing else "")
    )
    parity = document["parity"]
    verdict = "not checked" if parity is None else "passed" if parity["passed"] else "failed"
    output.line(f"parity   {verdict}")
    for text in (*document["deviations"], *document["notices"]):
        output.line(f"note: {text}")
    if output.verbose:
        modelfile = folder / document["variants"][0]["modelfile"]
        output.line(f"\n{modelfile.name}:\n\n{modelfile.read_text(encoding='utf-8').rstrip()}")


def _types(header: GGUFFile) -> dict[str, int]:
    return dict(sorted(Counter(tensor.type for tensor in header.tensors).items()))


def _histogram(types: dict[str, int]) -> str:
    ordered = sorted(types.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in ordered)


def _shown(value: object, verbose: bool) -> str:
    if isinstance(value, tuple):
        items = [_shown(item, verbose) for item in value[:_LONG]]
        return f"[{', '.join(items)}" + (f", … {len(value)} in all]" if len(value) > _LONG else "]")
    if isinstance(value, str):
        # Foreign text must not drive the terminal.
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in value)
        return text if verbose or len(text) <= 100 else f"{text[:97]}…"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _memory(plan: Plan, threads: int | None) -> int:
    from medllm_pack.pack.build import memory_bytes
    from medllm_pack.processors import usable

    return memory_bytes(len(plan.files), threads=threads or usable())
