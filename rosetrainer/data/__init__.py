"""Corpora: from texts to token ids on disk, and from those to batches.

Read tokenizer and bpe, then corpus (what is on disk), token_file and batches; masked_tokens,
span_corruption and blank_infilling make other objectives of them. A corpus is made of documents,
read by text_files, encoding and file_kinds, or of python_docs, shakespeare, markov or token_import;
corpus_writer writes it, corpus_folder puts it in its place. objectives says which is for a model,
advice what helps where there is no corpus.
"""
