"""Corpora: from texts to token ids, and from those to batches.

Read tokenizer, batches. On disk: corpus_files, corpus_folder, token_writer. Where texts come from:
file_kinds, text_encoding, text_files, document_files, documents, text_corpus, corpus_import,
python_docs, shakespeare, markov. corpus_advice says what helps; text_parts and token_pieces serve
the tokenizers.
"""
