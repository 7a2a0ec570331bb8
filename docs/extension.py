"""What the site needs beyond Sphinx's extensions: formulas, tables of speed, examples, links."""

import re
from pathlib import Path

from docutils import nodes
from math_core import LatexToMathML
from sphinx.addnodes import pending_xref
from sphinx.ext.autodoc.mock import _MockObject
from sphinx.transforms.post_transforms import SphinxPostTransform

import nbnorm
from benchmarks import tables
from benchmarks.runs import Run

DOCS = Path(__file__).parent
GALLERY = "generated/examples/"
FIELD = type(nbnorm.BatchNormForward.y)  # of a named tuple

mathml = LatexToMathML(fancy_error=False)

# Frameworks that are not installed are mocks, with which ``Tensor | None`` has to work as well.
_MockObject.__or__ = _MockObject.__ror__ = lambda self, other: self


def inline(writer, node):
    """Write a formula into the text."""
    writer.body.append(mathml.convert_with_local_state(node.astext(), displaystyle=False))
    raise nodes.SkipNode


def block(writer, node):
    """Write a formula into a box of its own, which scrolls if the page is narrower than it."""
    formula = mathml.convert_with_local_state(node.astext(), displaystyle=True)
    writer.body.append(f'<div class="formula">{formula}</div>\n')
    raise nodes.SkipNode


def write_speed(app):
    """Write the tables of benchmarks.md from the figures in speed.json."""
    path = DOCS / "generated" / "speed.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(tables.page(Run.read(DOCS / "speed.json")), encoding="utf-8")


def headers_are_rst(app):
    """Keep sphinx-gallery from reading a README.md, such as that of data/, as a section header."""
    app.config.sphinx_gallery_conf["source_suffix"] = [".rst"]


def read(app, document, source):
    """Prepare a page: an example's docstring, the list of scripts, or links to examples."""
    if document == f"{GALLERY}index":
        source[0] = scripts_listed(source[0])
    elif document.startswith(GALLERY):
        name = document.removeprefix(GALLERY)
        source[0] = re.sub(
            r"(?s)(\n\.\. _sphx_glr_\S+:\n\n)(.*?)(?=\n\n\.\. GENERATED FROM)",
            lambda match: match[1] + titled(match[2]) + result(name),
            source[0],
            count=1,
        )
    else:
        source[0] = re.sub(r"\]\(examples/(\w+)\.(?:py|rst)\)", rf"]({GALLERY}\1.rst)", source[0])
        source[0] = source[0].replace(f"{GALLERY}GALLERY_HEADER", f"{GALLERY}index")


def scripts_listed(gallery):
    """Move the programs that draw nothing from the gallery's cards to a list below them."""
    scripts = []

    def card(match):
        if draws(match[1]):
            return match[0]
        scripts.append(f"- :doc:`/{GALLERY}{match[1]}`\n")
        return ""

    gallery = re.sub(
        r'(?s)\.\. raw:: html\n\n    <div class="sphx-glr-thumbcontainer"'
        rf".*?:doc:`/{GALLERY}(\w+)`.*?\n    </div>\n\n\n",
        card,
        gallery,
    )
    before, toctree, after = gallery.partition(".. toctree::")
    return f"{before}.. rubric:: Scripts\n\n{''.join(scripts)}\n\n{toctree}{after}"


def draws(name):
    """Return True for an example with a picture: a plot, or one that names its thumbnail."""
    text = (DOCS / "examples" / f"{name}.py").read_text(encoding="utf-8")
    return name.startswith("plot_") or "\n# sphinx_gallery_thumbnail_path = " in text


def titled(docstring):
    """Return a docstring with its first line as title and indented paragraphs as code."""
    title, _, text = docstring.partition("\n")
    if not re.match(r"([=~*-])\1+$", text):
        text = f"{'=' * len(title)}\n{text}"
    return f"{title.removesuffix('.')}\n" + re.sub(r"(?<!::)\n\n(?= {4}\S)", "\n\n::\n\n", text)


def result(name):
    """Return the picture of an example's long run, if there is one."""
    drawn = (DOCS / "results" / f"{name}.svg").exists()
    return f"\n\n.. image:: /results/{name}.svg\n   :alt: what {name}.py draws" if drawn else ""


def no_fields(app, what, name, obj, skip, options):
    """Leave out fields of named tuples: their class describes them."""
    return True if isinstance(obj, FIELD) else None


def find(app, env, node, contnode):
    """Link a name of the API that a docstring writes without its module: `batch_norm_forward`."""
    if node.get("reftype") != "obj":
        return None
    return link(app, node["refdoc"], f"nbnorm.{node['reftarget']}", contnode)


def link(app, document, name, content):
    """Return a reference to a name of the API, or None if there is no such name."""
    python = app.env.domains.python_domain
    if name not in python.objects:
        return None
    return python.resolve_xref(app.env, document, app.builder, "obj", name, pending_xref(), content)


class LinkedNames(SphinxPostTransform):
    """Link code in the text that is a name of the API: `nbnorm.warmup`, `nbnorm.warmup(shape)`."""

    default_priority = 400

    def run(self, **_):
        """Put a reference around each such name."""
        for code in list(self.document.findall(nodes.literal)):
            name = code.astext().partition("(")[0]
            if name.startswith("nbnorm.") and not isinstance(code.parent, nodes.reference):
                reference = link(self.app, self.env.current_document.docname, name, code.deepcopy())
                if reference is not None:
                    code.replace_self(reference)


def setup(app):
    """Register the formulas, the handlers and the links with Sphinx."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("builder-inited", write_speed)
    app.connect("builder-inited", headers_are_rst, priority=0)
    app.connect("source-read", read)
    app.connect("autodoc-skip-member", no_fields)
    app.connect("missing-reference", find)
    app.add_post_transform(LinkedNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
