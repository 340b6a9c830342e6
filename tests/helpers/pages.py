"""Reads the HTML of a report as a browser does."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}
ADDRESSES = {"src", "href", "srcset", "poster", "action", "data"}


class Page(HTMLParser):
    """Asserts that elements nest properly, and collects texts, addresses and elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ADDRESSES]
        if tag == "img":
            assert dict(attrs)["alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def assert_self_contained(page: Page, html: str) -> None:
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert "script" not in page.elements
    assert not re.search(r"@import|url\(", html)
