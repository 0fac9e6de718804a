"""Text in, batches of tokens out.

`registry` finds a data set and `text` reads local files; `tokenizer` turns text into tokens;
`shards` keeps tokens in memory-mapped files; `dataset` ties these together behind one call;
`loader` cuts batches. `stories` holds the built-in text. `tokenizer_tool` is the command line.
"""
