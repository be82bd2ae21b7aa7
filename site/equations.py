"""A Sphinx extension: LaTeX as MathML, when the site is built.

Browsers draw MathML themselves and screen readers speak it, so a page needs neither a script nor the network; the font comes with the site.
"""
import re

from latex2mathml.converter import convert

def mathml(latex: str, block: bool = False) -> str:
    "An equation as a MathML element."
    latex = re.sub(r"\\(mathbb|mathcal|mathbf)\s+(\w)", r"\\\1{\2}", latex.strip()).replace(r"\arg", r"\operatorname{arg}\,")  # what the converter misreads
    text = convert(latex, display="block" if block else "inline")
    text = text.replace('<mn mathvariant="double-struck">1</mn>', "<mn>𝟙</mn>")  # browsers know no mathvariant; letters come as characters of their own
    text = re.sub(r"<mo[^>]*>(\||&#x0007C;)</mo>", '<mo stretchy="false" lspace="0" rspace="0">|</mo>', text)
    return text


def visit(block: bool):
    "A visitor that writes a node's equation and is done with it."
    def write(self, node):
        from docutils.nodes import SkipNode
        text = mathml(node.astext(), block)
        self.body.append(f'<div class="equation">{text}</div>' if block else text)
        raise SkipNode
    return write


def setup(app):
    app.add_html_math_renderer("mathml", (visit(False), None), (visit(True), None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
