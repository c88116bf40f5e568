"""Who runs, when, and on which ranks. Knows generations, their queue and their ranks; no protobuf, no pixels."""
