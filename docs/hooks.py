"""What MkDocs does not do by itself: links between notebooks, tables of presets, doctests."""

import pathlib
import re

import griffe

import mla_jax
from mla_jax import costs

ROOT = pathlib.Path(__file__).parents[1]


def on_page_markdown(markdown, config, **kwargs):
    """Replaces `{{ presets }}` by a table and `--8<-- "FILE:SECTION"` by that text."""

    def include(match):
        text = (ROOT / match[1]).read_text(encoding="utf-8")
        if match[2]:  # between lines with --8<-- [start:SECTION] and [end:SECTION]
            text = re.split(rf".*--8<-- \[(?:start|end):{match[2]}\].*\n", text)[1]
        if match[1].endswith(".py"):
            return text.strip()
        # Links to files beside README.md lead to the repository.
        link = rf"]({config['repo_url']}/blob/main/\1)"
        return re.sub(r"\]\((?!https?:|#)([^)]+)\)", link, text).rstrip()

    markdown = re.sub(r'--8<-- "([^":]+)(?::(\w+))?"', include, markdown)
    return markdown.replace("{{ presets }}", _presets()) if "{{ presets" in markdown else markdown


def on_page_content(html, page, **kwargs):
    """Lets links from one notebook to another lead to the rendered page."""
    if page.file.src_uri.endswith(".ipynb"):
        html = re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="../\1/"', html)
    return html


class FenceDoctests(griffe.Extension):
    """Makes code blocks of doctests, which stand in docstrings without a heading."""

    def on_object(self, *, obj, **kwargs):
        """Called for every object that is documented."""
        if obj.docstring and not obj.is_alias:
            obj.docstring.value = re.sub(
                r"^>>> .*?(?=\n\s*\n|\Z)", r"```pycon\n\g<0>\n```", obj.docstring.value,
                flags=re.M | re.S,
            )  # fmt: skip


def _presets():
    rows = ["| preset | D | N | Q | R | H | P | V | layers | MLA | cache, bytes per token (bf16) |"]
    rows.append("|---|" + "---:|" * 10)
    for name in mla_jax.presets():
        c = mla_jax.MLAConfig.from_preset(name)
        numbers = [c.hidden_size, c.num_attention_heads, c.q_lora_rank or "-", c.kv_lora_rank,
                   c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.num_hidden_layers,
                   c.mla_layers, f"{costs.cache_bytes(c, 1, 1):,}"]  # fmt: skip
        rows.append(f"| `{name}` | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(rows)
