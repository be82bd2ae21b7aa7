// What scrolls sideways can be reached and scrolled by the keyboard.
"use strict";
for (const node of document.querySelectorAll("pre, .table-wrapper, .cell_output, .equation")) if (node.scrollWidth > node.clientWidth) node.tabIndex = 0;
