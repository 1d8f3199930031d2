"""Fills the templates beside this file; the only place that needs jinja2."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.core.errors import RequestError

if TYPE_CHECKING:
    import jinja2

_HERE = Path(__file__).parent


def render(template: str, **view: Any) -> str:
    """The page that ``template`` makes of ``view``, all text escaped.

    Raises:
        RequestError: jinja2 is not installed.
    """
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    try:
        environment = _environment()
    except ModuleNotFoundError as error:
        raise RequestError(
            'the page needs jinja2, which is not installed; pip install "sparing[report]"'
        ) from error
    return environment.get_template(template).render(style=style, **view) + "\n"


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
