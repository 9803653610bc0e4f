"""Fills the templates of this package: HTML pages and Markdown tables."""

import functools
from typing import Any

import jinja2
from etils.epath import Path

from anoseg_jax.evaluation.results import format_value


def render(template: str, **values: Any) -> str:
    """Fills a template; in HTML all text is escaped."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    """Returns one environment for all templates: each is compiled once."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"metric": format_value, "duration": _duration, "plain": _plain}
    environment.filters["signed"] = "{:+.4f}".format
    return environment


def _plain(value: Any) -> str:
    if value is None:
        return "not available"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"
