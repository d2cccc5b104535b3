"""Whole plans, as they should be: a line a node."""

from __future__ import annotations

from amp_convert.plan.costs import Casts

BLOCK = {
    "default": """
        up/linear#0       | allow | op linear     | f16 | low | f16 f16 f16
        norm/layer_norm#0 | infer | op layer_norm | f16 | low | . . .
        /gelu#0           | infer | op gelu       | f16 | low | .
        down/linear#0     | allow | op linear     | f16 | low | . f16 f16
        /add#0            | infer | op add        | f32 | -   | . f32
        /softmax#0        | infer | op softmax    | f32 | -   | .
    """,
    "autocast": """
        up/linear#0       | allow | op linear.default | f16 | low | f16 f16 f16
        norm/layer_norm#0 | clear | op *              | f16 | low | . . .
        /gelu#0           | clear | op *              | f16 | low | .
        down/linear#0     | allow | op linear.default | f16 | low | . f16 f16
        /add#0            | clear | op *              | f32 | -   | . .
        /softmax#0        | clear | op *              | f32 | -   | .
    """,
    "half": """
        up/linear#0       | allow | op * | f16 | low | f16 f16 f16
        norm/layer_norm#0 | allow | op * | f16 | low | . . .
        /gelu#0           | allow | op * | f16 | low | .
        down/linear#0     | allow | op * | f16 | low | . f16 f16
        /add#0            | allow | op * | f16 | low | f16 .
        /softmax#0        | allow | op * | f16 | low | .
    """,
}


CNN = {
    "default": """
        c1/conv2d#0             | allow | op conv2d                   | f16 | low | f16 f16
        b1/_native_batch_norm_legit_no_training#0
                                | infer | op _native_batch_norm_legit* | f16 | low | . . . . .
        b1/operator.getitem#0   | none  |                             | f16 | -   |
        act/relu#0              | clear | op relu                     | f16 | low | .
        c2/conv2d#0             | allow | op conv2d                   | f16 | low | . f16 f16
        b2/_native_batch_norm_legit_no_training#0
                                | infer | op _native_batch_norm_legit* | f32 | -   | f32 . . . .
        b2/operator.getitem#0   | none  |                             | f32 | -   |
        act/relu#1              | clear | op relu                     | f32 | -   | .
        /mean#0                 | deny  | op mean                     | f32 | -   | .
        head/linear#0           | allow | op linear                   | f16 | low | f16 f16 f16
    """,
    "default, train": """
        c1/conv2d#0             | allow | op conv2d                   | f16 | low | f16 f16
        b1/add#0                | none  |                             | i64 | -   | .
        b1/_native_batch_norm_legit_functional#0
                                | infer | op _native_batch_norm_legit* | f16 | low | . . . . .
        b1/operator.getitem#0   | none  |                             | f16 | -   |
        b1/operator.getitem#1   | none  |                             | f32 | -   |
        b1/operator.getitem#2   | none  |                             | f32 | -   |
        act/relu#0              | clear | op relu                     | f16 | low | .
        c2/conv2d#0             | allow | op conv2d                   | f16 | low | . f16 f16
        b2/add#0                | none  |                             | i64 | -   | .
        b2/_native_batch_norm_legit_functional#0
                                | infer | op _native_batch_norm_legit* | f32 | -   | f32 . . . .
        b2/operator.getitem#0   | none  |                             | f32 | -   |
        b2/operator.getitem#1   | none  |                             | f32 | -   |
        b2/operator.getitem#2   | none  |                             | f32 | -   |
        act/relu#1              | clear | op relu                     | f32 | -   | .
        /mean#0                 | deny  | op mean                     | f32 | -   | .
        head/linear#0           | allow | op linear                   | f16 | low | f16 f16 f16
    """,
    "autocast": """
        c1/conv2d#0             | allow | op conv2d.default           | f16 | low | f16 f16
        b1/_native_batch_norm_legit_no_training#0
                                | clear | op *                        | f16 | low | . . . . .
        b1/operator.getitem#0   | none  |                             | f16 | -   |
        act/relu#0              | clear | op *                        | f16 | low | .
        c2/conv2d#0             | allow | op conv2d.default           | f16 | low | . f16 f16
        b2/_native_batch_norm_legit_no_training#0
                                | clear | op *                        | f16 | low | . . . . .
        b2/operator.getitem#0   | none  |                             | f16 | -   |
        act/relu#1              | clear | op *                        | f16 | low | .
        /mean#0                 | clear | op *                        | f16 | low | .
        head/linear#0           | allow | op linear.default           | f16 | low | . f16 f16
    """,
    "half": """
        c1/conv2d#0             | allow | op *                        | f16 | low | f16 f16
        b1/_native_batch_norm_legit_no_training#0
                                | allow | op *                        | f16 | low | . . . . .
        b1/operator.getitem#0   | none  |                             | f16 | -   |
        act/relu#0              | allow | op *                        | f16 | low | .
        c2/conv2d#0             | allow | op *                        | f16 | low | . f16 f16
        b2/_native_batch_norm_legit_no_training#0
                                | allow | op *                        | f16 | low | . . . . .
        b2/operator.getitem#0   | none  |                             | f16 | -   |
        act/relu#1              | allow | op *                        | f16 | low | .
        /mean#0                 | allow | op *                        | f16 | low | .
        head/linear#0           | allow | op *                        | f16 | low | . f16 f16
    """,
}


ATTENTION = {
    "default": """
        qkv/linear#0        | allow | op linear     | f16  | low | f16 f16 f16
        /split#0            | clear | op split      | f16  | low | .
        /operator.getitem#0 | none  |               | f16  | -   |
        /operator.getitem#1 | none  |               | f16  | -   |
        /operator.getitem#2 | none  |               | f16  | -   |
        /arange#0           | none  |               | i64  | -   |
        /slice#0            | none  |               | i64  | -   | .
        /unsqueeze#0        | none  |               | i64  | -   | .
        /lt#0               | none  |               | bool | -   | . .
        /transpose#0        | clear | op transpose  | f16  | low | .
        /matmul#0           | allow | op matmul     | f16  | low | . .
        /mul#0              | infer | op mul        | f32  | -   | f32
        /slice#1            | none  |               | bool | -   | .
        /unsqueeze#1        | none  |               | bool | -   | .
        /min#0              | clear | op min        | f32  | -   | .
        /sub#0              | infer | op sub        | f32  | -   | .
        /where#0            | clear | op where      | f32  | -   | . . .
        /to#0               | deny  | explicit cast | f32  | -   | .
        /softmax#0          | infer | op softmax    | f32  | -   | .
        /matmul#1           | allow | op matmul     | f16  | low | f16 .
        out/linear#0        | allow | op linear     | f16  | low | . f16
    """,
    "autocast": """
        qkv/linear#0        | allow | op linear.default | f16  | low | f16 f16 f16
        /split#0            | clear | op *              | f16  | low | .
        /operator.getitem#0 | none  |                   | f16  | -   |
        /operator.getitem#1 | none  |                   | f16  | -   |
        /operator.getitem#2 | none  |                   | f16  | -   |
        /arange#0           | none  |                   | i64  | -   |
        /slice#0            | none  |                   | i64  | -   | .
        /unsqueeze#0        | none  |                   | i64  | -   | .
        /lt#0               | none  |                   | bool | -   | . .
        /transpose#0        | clear | op *              | f16  | low | .
        /matmul#0           | allow | op matmul.default | f16  | low | . .
        /mul#0              | clear | op *              | f16  | low | .
        /slice#1            | none  |                   | bool | -   | .
        /unsqueeze#1        | none  |                   | bool | -   | .
        /min#0              | clear | op *              | f16  | low | .
        /sub#0              | clear | op *              | f16  | low | .
        /where#0            | clear | op *              | f16  | low | . . .
        /to#0               | deny  | explicit cast     | f32  | -   | .
        /softmax#0          | clear | op *              | f32  | -   | .
        /matmul#1           | allow | op matmul.default | f16  | low | f16 .
        out/linear#0        | allow | op linear.default | f16  | low | . f16
    """,
    "half": """
        qkv/linear#0        | allow | op *          | f16  | low | f16 f16 f16
        /split#0            | allow | op *          | f16  | low | .
        /operator.getitem#0 | none  |               | f16  | -   |
        /operator.getitem#1 | none  |               | f16  | -   |
        /operator.getitem#2 | none  |               | f16  | -   |
        /arange#0           | none  |               | i64  | -   |
        /slice#0            | none  |               | i64  | -   | .
        /unsqueeze#0        | none  |               | i64  | -   | .
        /lt#0               | none  |               | bool | -   | . .
        /transpose#0        | allow | op *          | f16  | low | .
        /matmul#0           | allow | op matmul     | f16  | low | . .
        /mul#0              | allow | op *          | f16  | low | .
        /slice#1            | none  |               | bool | -   | .
        /unsqueeze#1        | none  |               | bool | -   | .
        /min#0              | allow | op *          | f16  | low | .
        /sub#0              | allow | op *          | f16  | low | .
        /where#0            | allow | op *          | f16  | low | . . .
        /to#0               | deny  | explicit cast | f32  | -   | .
        /softmax#0          | allow | op *          | f16  | low | f16
        /matmul#1           | allow | op matmul     | f16  | low | . .
        out/linear#0        | allow | op *          | f16  | low | . f16
    """,
}


GATED = {
    "default": """
        a/linear#0          | allow | op linear | f16  | low | f16 f16 f16
        /split#0            | clear | op split  | f16  | low | .
        /operator.getitem#0 | none  |           | f16  | -   |
        /operator.getitem#1 | none  |           | f16  | -   |
        /exp#0              | deny  | op exp    | f32  | -   | f32
        /sum#0              | deny  | op sum    | f32  | -   | .
        /add#0              | infer | op add    | f32  | -   | .
        /div#0              | infer | op div    | f32  | -   | . .
        /relu#0             | clear | op relu   | f16  | low | f16
        /tanh#0             | infer | op tanh   | f16  | low | .
        /mul#0              | infer | op mul    | f16  | low | . f16
        /cat#0              | clear | op cat    | f16  | low | . .
        b/linear#0          | allow | op linear | f16  | low | . f16 f16
        /gt#0               | clear | op gt     | bool | -   | .
        /sum#1              | none  |           | i64  | -   | .
    """,
    "autocast": """
        a/linear#0          | allow | op linear.default | f16  | low | f16 f16 f16
        /split#0            | clear | op *              | f16  | low | .
        /operator.getitem#0 | none  |                   | f16  | -   |
        /operator.getitem#1 | none  |                   | f16  | -   |
        /exp#0              | clear | op *              | f16  | low | .
        /sum#0              | clear | op *              | f16  | low | .
        /add#0              | clear | op *              | f16  | low | .
        /div#0              | clear | op *              | f16  | low | . .
        /relu#0             | clear | op *              | f16  | low | .
        /tanh#0             | clear | op *              | f16  | low | .
        /mul#0              | clear | op *              | f16  | low | . .
        /cat#0              | infer | op cat.default    | f16  | low | . .
        b/linear#0          | allow | op linear.default | f16  | low | . f16 f16
        /gt#0               | clear | op *              | bool | -   | .
        /sum#1              | none  |                   | i64  | -   | .
    """,
    "half": """
        a/linear#0          | allow | op * | f16  | low | f16 f16 f16
        /split#0            | allow | op * | f16  | low | .
        /operator.getitem#0 | none  |      | f16  | -   |
        /operator.getitem#1 | none  |      | f16  | -   |
        /exp#0              | allow | op * | f16  | low | .
        /sum#0              | allow | op * | f16  | low | .
        /add#0              | allow | op * | f16  | low | .
        /div#0              | allow | op * | f16  | low | . .
        /relu#0             | allow | op * | f16  | low | .
        /tanh#0             | allow | op * | f16  | low | .
        /mul#0              | allow | op * | f16  | low | . f16
        /cat#0              | allow | op * | f16  | low | . .
        b/linear#0          | allow | op * | f16  | low | . f16 f16
        /gt#0               | allow | op * | bool | low | f16
        /sum#1              | none  |      | i64  | -   | .
    """,
}


MODELS = ("block", "cnn", "attention", "gated")


WHOLE = [
    (model, title, expected)
    for model, plans in [("block", BLOCK), ("cnn", CNN), ("attention", ATTENTION), ("gated", GATED)]
    for title, expected in plans.items()
]


CASTS = {
    ("block", "default"): Casts(2, 4, 6),
    ("block", "autocast"): Casts(1, 4, 5),
    ("block", "half"): Casts(2, 4, 7),
    ("cnn", "default"): Casts(4, 5, 9),
    ("cnn", "default, train"): Casts(4, 5, 9),
    ("cnn", "autocast"): Casts(2, 5, 7),
    ("cnn", "half"): Casts(2, 5, 7),
    ("attention", "default"): Casts(4, 3, 7),
    ("attention", "autocast"): Casts(3, 3, 6),
    ("attention", "half"): Casts(3, 3, 6),
    ("gated", "default"): Casts(4, 5, 9),
    ("gated", "autocast"): Casts(3, 4, 7),
    ("gated", "half"): Casts(3, 5, 9),
}
