"""The Python API, for a model that the caller holds; `import prunebench` has its names.

    import prunebench

    report = prunebench.prune(model, tokenizer, method="wanda", sparsity="2:4", calibration="c4")
    prunebench.perplexity(model, tokenizer, "wiki", seqlen=2048).value

docs/python.md shows a whole notebook.
"""
