"""Run by torchrun in two processes: the gradients of one step, written by the first of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from small import SMALL_TEXTS, encode, make_teacher, make_tokenizer, run_one_step

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    student_tok, teacher_tok = make_tokenizer(700, "{1,3}", "<s>"), make_tokenizer(500, "", "<|begin|>")
    examples = encode(SMALL_TEXTS[:8], student_tok, teacher_tok, None)
    for k, one in enumerate(options):
        teachers = [
            make_teacher(student_tok, teacher_tok, learnable=one.pop("learnable", False)),
            make_teacher(student_tok, None, 2, name="twin"),
        ]
        gradients = run_one_step(folder, student_tok, teachers, examples, **one)
        if torch.distributed.get_rank() == 0:
            torch.save(gradients, folder / f"{k}.pt")
    torch.distributed.destroy_process_group()
