"""A Sphinx extension: LaTeX as MathML, when the site is built.

Browsers draw MathML themselves and screen readers speak it, so a page needs neither a script nor the network; the font comes with the site.
"""
import re

from latex2mathml.converter import convert

#: MathML Core knows no mathvariant but normal: letters of other alphabets are characters of their own.
ALPHABETS = {"double-struck": (0x1D538, 0x1D552, {"C": "ℂ", "H": "ℍ", "N": "ℕ", "P": "ℙ", "Q": "ℚ", "R": "ℝ", "Z": "ℤ", "1": "𝟙"}),
             "script": (0x1D49C, 0x1D4B6, {"B": "ℬ", "E": "ℰ", "F": "ℱ", "H": "ℋ", "I": "ℐ", "L": "ℒ", "M": "ℳ", "R": "ℛ"}),
             "bold": (0x1D400, 0x1D41A, {})}


def letter(alphabet: str, character: str) -> str:
    "A letter in another alphabet."
    upper, lower, exceptions = ALPHABETS[alphabet]
    if character in exceptions: return exceptions[character]
    if not (character.isascii() and character.isalpha()): return character
    return chr(upper + ord(character) - ord("A") if character.isupper() else lower + ord(character) - ord("a"))


def mathml(latex: str, block: bool = False) -> str:
    "An equation as a MathML element, its LaTeX beside it for those who copy it."
    text = convert(latex.strip().replace(r"\arg", r"\operatorname{arg}\,"), display="block" if block else "inline")
    text = re.sub(r'<(m[in]) mathvariant="(double-struck|script|bold)">(\w)</\1>', lambda m: f"<{m[1]}>{letter(m[2], m[3])}</{m[1]}>", text)
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
