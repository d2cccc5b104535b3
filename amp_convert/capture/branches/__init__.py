"""The branches of `torch.cond` in the graph around them, so that they are planned, converted and
compared like any other operator.

A branch is a graph of its own, which no stage looks into. `inline` puts the operators of both where
the condition stands, and lets `aten.where` choose among their results. A node's metadata says which
branches it is in (`BRANCH`) and which condition a choice belongs to (`CHOICE`): see `choices`.

No run computes the branch that it does not take: the operators there may raise on the values of the
other, or have no gradient. A run node by node skips them (`choices`). A graph that is called whole
is cut into graphs again (`nest`).

Left as it is, in FP32, is a condition on sizes, and one with a branch that draws random numbers,
writes to what it is given, or calls what nobody here knows.
"""
