"""convert: dense checkpoints to experts, and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparing.cli.common import Json, app, one_place, progress, show, told
from sparing.core.errors import RequestError

if TYPE_CHECKING:
    from sparing.convert.options import Conversion


@app.command()
def convert(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="A Hugging Face model's directory; several: --from."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The new directory.")],
    experts: Annotated[
        int | None,
        typer.Option(help="Experts that each block is cut into; default 8, or one for each model."),
    ] = None,
    active: Annotated[int, typer.Option(help="Experts that a token passes.")] = 2,
    residual: Annotated[int | None, typer.Option(help="How many of both are always on.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="random, contiguous, kmeans, kmeans-cosine, coactivation, gradient, "
            "sharing-inner, sharing-inter, groups or copy."
        ),
    ] = "random",
    scale: Annotated[
        str | None,
        typer.Option(help="published, unbiased, unit, calibrated, learned, or a number."),
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="zero, random, centroids, keys or distilled.")
    ] = None,
    compensate: Annotated[
        str, typer.Option(help="For experts not chosen: none, mean or fitted biases.")
    ] = "none",
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit last projections to the dense output.")
    ] = False,
    clusters: Annotated[
        str, typer.Option(help="Importance by clusters of text or tokens.")
    ] = "text",
    encoder: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Cluster texts by this sentence encoder, not the model."),
    ] = None,
    first_dense: Annotated[int, typer.Option(help="So many first blocks stay dense.")] = 0,
    last_dense: Annotated[int, typer.Option(help="So many last blocks stay dense.")] = 0,
    form: Annotated[str, typer.Option(help="auto, export or sparing.")] = "auto",
    router: Annotated[
        str, typer.Option(help="Any router of sparing ls, for form sparing.")
    ] = "top-k",
    set_: Annotated[
        list[str] | None,
        typer.Option("-s", "--set", metavar="KEY=VALUE", help="Set an option of the router."),
    ] = None,
    noise: Annotated[float, typer.Option(help="Of copies, in standard deviations.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to calibrate on; default: what the model itself writes."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    block: Annotated[
        str | None,
        typer.Option(
            metavar="gate=A,up=B,down=C,act=D", help="A feed-forward block by its parts' names."
        ),
    ] = None,
    to_dense: Annotated[
        bool, typer.Option("--to-dense", help="Put a converted model together again.")
    ] = False,
    several: Annotated[
        bool,
        typer.Option("--from", help="Make one expert of each of several fine-tunes of one base."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be done.")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="Show no progress.")] = False,
    as_json: Json = False,
) -> None:
    """Make experts of a dense checkpoint's feed-forward blocks, and check the result."""
    with told(again="the same command"):
        from sparing import convert as conversion
        from sparing.convert.planning import check_place
        from sparing.convert.skeleton import described

        path = paths[0]
        if len(paths) > 1 and not several:
            raise RequestError(
                f"{len(paths)} models were given; write --from to make one expert of each of them"
            )
        if to_dense:
            if dry_run or several:
                raise RequestError("--to-dense goes with neither --dry-run nor --from")
            with progress(quiet) as note:
                put = conversion.to_dense(path, out, told=note)
            show(put.to_dict(), as_json, lambda: [*put.lines(), f"written: {out}"])
            return
        options: Conversion = conversion.Conversion(
            experts=experts or (len(paths) if several else 8),
            active=active,
            residual=residual,
            method="copy" if several else method,
            scale=_scale(scale),
            gate=gate,
            compensate=compensate,  # type: ignore[arg-type]
            refit=refit,
            clusters=clusters,  # type: ignore[arg-type]
            encoder=encoder,
            first_dense=first_dense,
            last_dense=last_dense,
            form=form,  # type: ignore[arg-type]
            router=router,
            router_options=_settings(set_ or []),
            noise=noise,
            seed=seed,
            sequences=sequences,
            length=length,
        )
        family = described(block) if block is not None else None
        if several and text:
            raise RequestError("--from reads no text: its gate is random, zero or keys")
        planned = conversion.plan(path, options, data=bool(text), family=family)
        if dry_run:
            check_place(out, planned.bytes)
            show(planned.to_dict(), as_json, planned.lines)
            return
        if not quiet:
            # what loads the result is said before anything is converted
            typer.echo("\n".join(planned.lines()), err=True)
        with progress(quiet) as note:
            if several:
                made = conversion.combine(paths, out, options, family=family, told=note)
            else:
                made = conversion.convert(
                    path, out, options, texts=text or (), family=family, told=note
                )
        before = [] if not quiet and one_place() else planned.lines()
        found = [*before, *made.checked.lines(), f"written: {out}"]
        show(made.to_dict(), as_json, lambda: found)


def _scale(text: str | None) -> str | float | None:
    if text is not None and re.fullmatch(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", text):
        return float(text)
    return text


def _settings(items: list[str]) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise RequestError(f'-s "{item}" sets nothing; write KEY=VALUE')
        found[key] = yaml.safe_load(value)
    return found
