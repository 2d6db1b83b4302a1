"""Shape letters, and the logical names that link array dimensions to a device mesh. Imports nothing.

Array names end in shape letters where two shapes could be confused, and einsum letters match them:

    B batch           L length (query)   S length (key)     A coordinate axes   P position sets
    N digits          R encoder rows     E signal width     D model width       F feature width
    H heads           K head width       C candidates       M distillation window
    V vocabulary or classes
"""

BATCH = "batch"
LENGTH = "length"
ROWS = "rows"  # positions that the encoder encodes; sharded over the data axes like a batch
WIDTH = "width"
HEADS = "heads"
HEAD_WIDTH = "head_width"
HIDDEN = "hidden"
VOCABULARY = "vocabulary"
