"""Pages of figures and tables: the jinja2 templates of this folder, and the drawings that go into them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from pipetrgl.errors import ConfigError
from pipetrgl.studies import plots

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure


def require_extra() -> None:
    """Raises:
    ConfigError: matplotlib or jinja2 is missing.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        message = f"the report needs {error.name}; install the extra: pip install 'pipetrgl[plot]'"
        raise ConfigError(message) from error


def drawing(figure: Figure, name: str, title: str) -> Markup:
    """A figure as a part of a page; `name` is unique on it."""
    from markupsafe import Markup

    return Markup(plots.svg(figure, name, title))


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page; every value that its template names must be there."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("pipetrgl.studies").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(values)
