"""Read the Jinja templates of the report, of the claims and of the lesson."""

from __future__ import annotations

from pathlib import Path

import jinja2


def read_template(file: Path, escape: bool = True) -> jinja2.Template:
    """A template, which may import others of its folder, and draw.jinja.

    escape: the values that it is filled with are text, not HTML. It is an error to leave one out.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([file.parent, Path(__file__).parent]),
        undefined=jinja2.StrictUndefined,
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(file.name)
