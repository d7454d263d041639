"""What `publish`, `pull` and `inspect` do with hf:// targets: one library call each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from medllm_pack.cli.console import Output

if TYPE_CHECKING:
    from medllm_pack.progress import Reporter
    from medllm_pack.publish.hub_look import HubLook
    from medllm_pack.publish.release import Release
    from medllm_pack.publish.targets import HubTarget


def publish(
    release: Release, target: HubTarget, *, public: bool, dry_run: bool, report: Reporter
) -> dict[str, Any]:
    """Publish, or say what would be sent; return the document for --json."""
    from medllm_pack.publish.hub import missing_on_hub, publish_to_hub

    if dry_run:
        files = missing_on_hub(release, target)
        would = {"bytes": sum(files.values()), "blobs": len(files)}
        return {"target": str(target), "dry_run": True, "would_send": would, "files": files}
    done = publish_to_hub(release, target, private=not public, report=report)
    if done.private and public:
        report.notice(
            f"{target.repository} stays private; https://huggingface.co/{target.repository}/settings"
            " changes that"
        )
    elif done.private:
        report.notice(
            "the repository is private: for `ollama run`, add ~/.ollama/id_ed25519.pub at "
            "https://huggingface.co/settings/keys"
        )
    quants = [tagged.quant for tagged in release.images]
    return {
        "target": str(target),
        "commit": done.commit,
        "url": done.url,
        "created": done.created,
        "private": done.private,
        "sent": list(done.sent),
        "files": dict(done.files),
        "run": [f"ollama run hf.co/{target.repository}:{quant.upper()}" for quant in quants],
    }


def show_published(output: Output, document: dict[str, Any]) -> None:
    """Show what was published, or would be."""
    from medllm_pack.pack.card import human_bytes

    if "would_send" in document:
        would = document["would_send"]
        output.line(f"would send {would['blobs']} files, {human_bytes(would['bytes'])}")
        return
    what = f"{len(document['sent'])} files sent" if document["sent"] else "nothing had changed"
    output.line(f"{document['target']} is at {document['commit'][:12]}: {what}")
    output.line(document["url"])
    # Ollama asks for the main branch.
    for line in () if "@" in document["target"] else document["run"]:
        output.line(f"  {line}")


def pull(
    target: HubTarget, out: Path, *, quants: list[str], replace: bool, report: Reporter
) -> dict[str, Any]:
    """Pull a pack; return what --json adds about it."""
    from medllm_pack.publish.hub_pull import pull_from_hub

    pulled = pull_from_hub(target, out, quants=quants, replace=replace, report=report)
    overrides = list(pulled.overrides)
    return {"commit": pulled.commit, "overrides": overrides}


def inspect(text: str, output: Output) -> None:
    """Show what a repository holds, without bringing the weights."""
    from medllm_pack.errors import UsageError
    from medllm_pack.publish.hub_look import look_at_hub
    from medllm_pack.publish.targets import HubTarget, parse_target

    target = parse_target(text)
    if not isinstance(target, HubTarget):
        raise UsageError(f"{target} is not on the Hub; inspect takes a file, a pack or hf://…")
    with output.reporter() as report:
        look = look_at_hub(target, report=report)
    output.result(_document(look), lambda: _show(output, look))


def _document(look: HubLook) -> dict[str, Any]:
    from medllm_pack.cli.show import gguf_document

    files = [
        {"file": file.name, "sha256": file.sha256, **gguf_document(file.header)}
        for file in look.files
    ]
    document = {"target": str(look.target), "commit": look.commit, "pack": look.document}
    return document | {"files": files}


def _show(output: Output, look: HubLook) -> None:
    from medllm_pack.cli.show import gguf_file, headline

    output.line(f"{look.target} at {look.commit[:12]}\n")
    rows = [(f.name, headline(f.header), f"sha256:{f.sha256 or 'unknown'}") for f in look.files]
    output.table(("file", "model", "digest"), rows)
    if look.document is None:
        output.line("\nnot a pack of medllm-pack")
    if output.verbose:
        output.line()
        gguf_file(output, look.files[0].header)
