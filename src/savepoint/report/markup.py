"""HTML from calls. Whatever is not markup already is escaped, so a name from a log or a config never becomes a tag."""

import html
from collections.abc import Iterable
from typing import Any

_VOID = ("img", "meta")


class Markup(str):
    """Text that is HTML already."""


def element(tag: str, *children: str | None, **attributes: Any) -> Markup:
    """`element("td", "a < b", class_="num")`: `_` ends a name that Python has taken, and stands for `-` within one."""
    words = [tag]
    for name, value in attributes.items():
        if value is not None and value is not False:
            name = name.rstrip("_").replace("_", "-")
            words.append(name if value is True else f'{name}="{html.escape(str(value))}"')
    opened = f"<{' '.join(words)}>"
    return Markup(opened if tag in _VOID else f"{opened}{joined(*children)}</{tag}>")


def joined(*children: str | None) -> Markup:
    return Markup("".join(one if isinstance(one, Markup) else html.escape(one) for one in children if one))


def section(title: str, *content: str | None) -> Markup:
    name = title.lower().replace(" ", "-")
    return element("section", element("h2", title, id=name), *content, aria_labelledby=name)


def folded(title: str, content: Markup) -> Markup:
    """Closed until it is asked for."""
    return element("details", element("summary", title), content)


def command(text: str) -> Markup:
    """What is typed: it breaks between words, not within an option."""
    words = [element("span", word, class_="word") for word in text.split(" ")]
    return element("code", Markup(" ".join(words)))


def facts(pairs: Iterable[tuple[str, str]]) -> Markup:
    return element(
        "dl", *(element("div", element("dt", name), element("dd", value)) for name, value in pairs), class_="facts"
    )
