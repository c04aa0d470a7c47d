"""What MkDocs does not do by itself: includes, links, the version, tables of models, doctests."""

import pathlib
import re
import tomllib

import griffe

import mla_jax
from mla_jax import costs, families

ROOT = pathlib.Path(__file__).parents[1]
# Pages of other projects that signatures and texts link to.
NNX = "https://flax.readthedocs.io/en/stable/api_reference/flax.nnx"
JAX = "https://docs.jax.dev/en/latest/_autosummary"
ELSEWHERE = {
    "flax.nnx.Module": f"{NNX}/module.html#flax.nnx.Module",
    "flax.nnx.Rngs": f"{NNX}/rnglib.html#flax.nnx.Rngs",
    "jax.Array": f"{JAX}/jax.Array.html",
    "jax.Device": f"{JAX}/jax.Device.html",
    "jaxtyping.Array": f"{JAX}/jax.Array.html",
    **dict.fromkeys(
        ("jaxtyping.Bool", "jaxtyping.Float", "jaxtyping.Int"),
        "https://docs.kidger.site/jaxtyping/api/array/",
    ),
}


def on_config(config):
    """Shows the version in the footer of every page."""
    config.copyright = f"mla_jax {mla_jax.__version__}, Apache-2.0"
    return config


def on_env(env, config, **kwargs):
    """Tells the plugin for references where other projects' names are documented."""
    for name, url in ELSEWHERE.items():
        config.plugins["autorefs"].register_url(name, url)
    return env


def on_page_markdown(markdown, config, **kwargs):
    """Replaces `{{ models }}` by tables, `{{ version }}`, and `--8<-- "FILE:PART"` by a text."""

    def include(match):
        text = (ROOT / match[1]).read_text(encoding="utf-8")
        if match[2] and match[2][0].isdigit():  # lines, from 1: N or N-M
            first, _, last = match[2].partition("-")
            text = "\n".join(text.splitlines()[int(first) - 1 : int(last or first)])
        elif match[2]:  # between lines with --8<-- [start:SECTION] and [end:SECTION]
            text = re.split(rf".*--8<-- \[(?:start|end):{match[2]}\].*\n", text)[1]
        if match[1].endswith(".py"):
            return text.strip()
        # Links to files beside README.md lead to the repository, those into docs/ to its page.
        text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
        link = rf"]({config['repo_url']}/blob/main/\1)"
        outside = r"\]\((?!https?:|#|\w+\.md)([^)]+)\)|\]\(((?:CONTRIBUTING|CHANGELOG)\.md)\)"
        return re.sub(outside, link, text).rstrip()

    markdown = re.sub(r'--8<-- "([^":]+)(?::([\w-]+))?"', include, markdown)
    markdown = markdown.replace("{{ version }}", mla_jax.__version__)
    made = {"models": _models, "loaded": _loaded, "ratios": _ratios, "others": _others}
    for name, table in made.items():
        if f"{{{{ {name} }}}}" in markdown:
            markdown = markdown.replace(f"{{{{ {name} }}}}", table())
    return markdown


def on_page_content(html, page, **kwargs):
    """Puts drawings into the page, and lets links between notebooks lead to rendered pages."""

    def drawing(match):
        return f'<figure class="mla-figure">{(ROOT / "docs" / match[1]).read_text()}</figure>'

    html = re.sub(r"<p>{{ drawing ([\w/.]+) }}</p>", drawing, html)
    if page.file.src_uri.endswith(".ipynb"):
        html = re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="../\1/"', html)
        html = _fold(html)
    return html


def on_page_context(context, page, config, **kwargs):
    """Lets "edit this page" lead to the file that a person edits."""
    source, edited = page.file.src_uri, None
    if source.endswith(".ipynb"):  # docs/notebooks is a link, and the text of the pair is Markdown
        edited = source.replace(".ipynb", ".md")
    elif source in ("changelog.md", "contributing.md"):
        edited = source.upper().replace(".MD", ".md")
    if edited is not None:
        page.edit_url = f"{config['repo_url']}/edit/main/{edited}"
    return context


def _fold(html):
    """A notebook's page, with the code of cells that begin with `# @title` folded, as in Colab."""
    cell, outputs = '<div class="jp-Cell-inputWrapper"', '<div class="jp-Cell-outputWrapper">'
    parts = html.split(cell)
    for i, part in enumerate(parts):
        title = re.search(r"# @title (.*?)</span>", part)
        if title is None or i == 0:
            continue
        if outputs not in part:
            raise ValueError(f"the cell {title[1]!r} shows nothing: execute the notebook")
        code, rest = (cell + part).split(outputs, 1)
        opened = f'<details class="mla-code"><summary>{title[1]}</summary>'
        parts[i] = f"{opened}{code}</details>{outputs}{rest}"
    return parts[0] + "".join(
        part if part.startswith("<details") else cell + part for part in parts[1:]
    )


class FenceDoctests(griffe.Extension):
    """Makes code blocks of doctests, which stand in docstrings without a heading.

    What tells doctest how to compare is left out.
    """

    def on_object(self, *, obj, **kwargs):
        """Called for every object that is documented."""
        if obj.docstring and not obj.is_alias:
            text = re.sub(r"\n *\.\.\. # doctest: .*|  # doctest: .*", "", obj.docstring.value)
            obj.docstring.value = re.sub(
                r"^>>> .*?(?=\n\s*\n|\Z)", r"```pycon\n\g<0>\n```", text, flags=re.M | re.S
            )


def _released():
    """What docs/models.toml says of released models: family, and its models by preset."""
    with (ROOT / "docs" / "models.toml").open("rb") as file:
        return tomllib.load(file)


def _models():
    parts = []
    for name, released in _released().items():
        rows = [f"### {name}", ""]
        rows += ["| model | parameters | cache per token | here |", "|---|---|---|---|"]
        for preset, model in released.items():
            config = mla_jax.MLAConfig.from_preset(preset)
            family = families.find(model["model_type"])
            here = "layer" if family.decoder is None else "whole model"
            if config.mla_layers != config.num_hidden_layers:
                kept = f"{config.mla_layers} attentions in {config.num_hidden_layers} layers"
                here = f"{here} ({kept})"
            link = model["name"]
            if "repo" in model:
                link = f"[{link}](https://huggingface.co/{model['repo']})"
            kind = "absorbed" if config.index_topk is None else "sparse"
            cached = f"{costs.cache_bytes(config, 1, 1, kind) / 1024:.1f} KiB"
            rows.append(f"| {link}<br>`{preset}` | {model['size']} | {cached} | {here} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _loaded():
    """How many released models there are."""
    return str(sum(map(len, _released().values())))


def _others():
    """Families that are known without a preset, and those that are refused as a whole."""
    listed = {m["model_type"] for released in _released().values() for m in released.values()}
    known, refused = [], []
    for family in {id(one): one for one in families.FAMILIES.values()}.values():
        name = f"`{family.model_types[0]}`"
        if family.refused is not None:
            refused.append(f"{name} ({family.refused})")
        elif not listed & set(family.model_types):
            known.append(name)
    return (
        f"Known by their config.json without a preset: {', '.join(known)}. "
        f"Refused, with the reason: {'; '.join(refused)}."
    )


def _ratios():
    rows = ["| preset | D | N | Q | R | H | P | V | R / D | N (H+V) / D | R / (H+V) |"]
    rows.append("|---|" + "---:|" * 10)
    for released in _released().values():
        for preset in released:
            c = mla_jax.MLAConfig.from_preset(preset)
            per_head = c.qk_nope_head_dim + c.v_head_dim
            numbers = [
                c.hidden_size, c.num_attention_heads, c.q_lora_rank or "-", c.kv_lora_rank,
                c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim,
                f"1/{c.hidden_size / c.kv_lora_rank:.0f}",
                f"{c.num_attention_heads * per_head / c.hidden_size:.1f}",
                f"{c.kv_lora_rank / per_head:.1f}",
            ]  # fmt: skip
            rows.append(f"| `{preset}` | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(rows)
