def ids_and_labels(turns, tokenizer):
    """Turns [(text, is_answer), ...] -> ids and labels, two lists of one length."""
    ids = [tokenizer.bos_id]
    labels = [-100]
    for text, is_answer in turns:
        turn = tokenizer.encode(text)
        if is_answer:
            turn = [*turn, tokenizer.eos_id]
        ids += turn
        labels += turn if is_answer else [-100] * len(turn)
    return ids, labels
