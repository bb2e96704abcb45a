"""Shows docstrings in the style of transformers: their sections, arguments and cross references as Markdown."""

import re
from typing import Any

import griffe


PACKAGE = "transformers_sled"
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples):$")
ARGUMENT = re.compile(r"^    (\*{0,2}\w+) \((.+)\):$")
ERROR = re.compile(r"^    `\w+`: ")
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")


class TransformersDocstrings(griffe.Extension):
    """Turns each docstring into Markdown before it is rendered. The style `null` in mkdocs.yml then leaves it as it is."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self.package = pkg
        self.convert(pkg)

    def convert(self, obj: griffe.Object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = self.to_markdown(obj.docstring.value)
        for member in obj.members.values():
            if not member.is_alias:
                self.convert(member)

    def to_markdown(self, text: str) -> str:
        lines, section = [], None
        for line in text.splitlines():
            if found := SECTION.match(line):
                section = found[1]
                lines += [f"**{section}**", ""]
            elif section in ("Args", "Attributes") and (found := ARGUMENT.match(line)):
                name = found[1].replace("*", r"\*")
                lines += [f"- **{name}** ({found[2]})  "]
            elif section in ("Args", "Attributes"):
                lines.append(line[4:])
            elif section == "Raises" and ERROR.match(line):
                lines.append(f"- {line[4:]}")
            elif section in ("Raises", "Returns", "Yields"):
                lines.append(line.removeprefix("    "))
            else:
                lines.append(line)
        return REFERENCE.sub(self.to_link, "\n".join(lines))

    def to_link(self, found: re.Match) -> str:
        shown = found[2].rpartition(".")[2] if found[1] else found[2]
        is_own = found[2].split(".")[0] in self.package.members
        return f"[`{shown}`][{PACKAGE}.{found[2]}]" if is_own else f"`{shown}`"
