"""A page about one training step, made from a real step of a real model (`mantrans explain`).

    step        runs the step in float64 with the reference's operations, recorded
    operations  what the page says of each operation: its title, formulas, names of what it returns
    arrays      tensors as heat maps
    boxes       the recorded calls as boxes, and the moments at which they compute
    page        all of it as one HTML file: page.html, page.css, page.js

The data of the page is one JSON object in `<script type="application/json" id="step">`:

    about       {title, text, notes: [str], config: {field: value}, parameters: int,
                 sizes: {B, T, C, H, H_kv, D, F, V}, learning_rate, updates (the step's number),
                 optimizer: {name, and its numbers}, grad_norm, clip, applied}
    tokens      [{id, text}] of the sentence; targets [id or null]; losses [float or null];
    loss        their mean
    texts       {id: text} of all tokens that anything here names
    arrays      [{shape, axes: [letter a dimension], planes: int, rows: [int] or null,
                 columns: [int] or null, data, least, most, mean, rms}]: a tensor as `planes`
                 matrices (of heads), of which the named rows and columns are kept (null: all).
                 data: base64 of float32, little endian, in the order plane, row, column. The
                 statistics are of the whole tensor. B, which is 1, is left out
    boxes       [{layer, operation, title, group, inputs, outputs, inside: [pair],
                 parameters: [name], keeps: numbers that its backward reads again}] in the order of
                 the forward. A pair is {name, gradient_name,
                 value, gradient: array or null, error}; error as below or null
    moments     [{phase: "forward" | "backward" | "update", box: index or null, functions: [name],
                 caller: {file, link, line}, activations, gradients: numbers alive then}]
    functions   {name: {file, link, line, source}} of the operations; link: from the page, or null
    words       {operation: {title, derivation: {file, link}, forward: {formulas: [str], why},
                 backward: same}}
    parameters  {name: {shape, value, gradient: array, norms: {value, gradient, change}, error,
                 elements: [[int]], and for each of these elements: gradients, before, after,
                 update: {local variable of the optimizer's function, such as v_hat: [float]},
                 differences: {step, above, below, slopes: [float]}}}
                 error: {absolute, relative}: the largest against autograd's, and that relative to
                 autograd's largest. above, below: the loss with the element raised and lowered by
                 step; slopes: (above - below) / (2 step)
    results     {layer.name: {error, elements, gradients, differences}}: the same of inputs of boxes
                 that have no matrix, such as "blocks.0.attention.qkv"
    residual    [{layer, norm, gradient}]: the residual's norm at each norm layer, and that of
                 its gradient
    norms       {layer: {g: [float a position] or null, x_hat, square: same}}: the means of g
                 and of g x̂, which the gradient loses (RMS norm: only the second), and of g²
    deltas      {layer: [[float a query] a head]}: what attention's softmax takes from dp
    predictions [{ids: [int], probabilities, gradients: [float]}] a position: its target, if it has
                 one, then the likeliest tokens
    tied        {ids: [int], output, embedding, together: array, norms: {each of them: [float]}} or
                 null: the two gradients of rows of the token table, and their sum
    variants    [{name, loss, length}]: the loss after other updates, and the update's length
"""
