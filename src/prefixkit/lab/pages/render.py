"""Pages for people: one HTML file each, in one style, readable without a network and without scripts."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_page(template: str, **values: Any) -> str:
    """Return a page made from one of the templates; text is escaped, a missing value is an error."""
    environment = Environment(
        loader=PackageLoader("prefixkit.lab.pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)
