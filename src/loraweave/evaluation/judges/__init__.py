"""Pictures compared in pairs by a vision-language model, as Multi-LoRA Composition does (arXiv 2402.16843, section 4).

``pictures.py`` reads what is to be compared, ``question.py`` says what is asked and reads the answer, ``server.py``
asks, ``answers.py`` keeps the answers, ``judge.py`` runs through all questions, ``tally.py`` counts, ``estimate.py``
says what it will cost.
"""
