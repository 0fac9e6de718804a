"""Text in, batches of tokens out.

`registry` finds a data set, `files` local files, `text` and `parquet` read them, `foreign` names
what is no text; `tokenizer` turns text into tokens; `holdout` says what is validated on; `shards`
keeps tokens in memory-mapped files; `dataset` ties these together behind one call; `loader` cuts
batches. `stories` holds the built-in text. `tokenizer_tool` is the command line.
"""
