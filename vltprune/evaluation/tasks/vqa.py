"""Visual question answering: VQAv2, Visual Genome, DAQUAR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...data import Question, answer_list, vqa
from ...data.annotations import question
from ...models.wordpiece import clean_question
from ...registry import tasks
from .. import metrics
from .base import DEFAULTS, LONGEST, Images, Options, Words, dense, number, words_of


@tasks.register("vqa")
@dataclass(frozen=True)
class Vqa:
    """Answers by `rank` among a list (BLIP's way), or by `generate` in free words, from the models that have both.

    Scored by VQA accuracy where answers are several people's, by sets where they belong together; where they are held
    back there is nothing to score, and `results` is what VQA's server scores.
    """

    words: Words
    answer_words: Words
    answers: tuple[str, ...] = ()
    choice: tuple[Tensor, ...] = ()  # their input_ids and attention_mask [answers, length]

    @staticmethod
    def read(data: str, images: Images, strict: bool = False) -> Sequence[Question]:
        return vqa(data, images, strict=strict)

    entry = staticmethod(question)

    @classmethod
    def of(cls, model: nn.Module, options: Options = DEFAULTS) -> Vqa:
        host = dense(model)
        if not (hasattr(host, "rank") and hasattr(host, "generate")):
            raise ValueError(f"vqa asks for answers, and a {type(host).__name__} gives none: use a blip_vqa")
        words = words_of(host, host.text, options, clean_question, max_length=LONGEST)
        answer_words = words_of(host, host.text, options, str)
        if options.answers is None:
            return cls(words, answer_words)
        answers = answer_list(options.answers)
        return cls(words, answer_words, answers, answer_words.encode(answers))

    def texts(self, records: Sequence[Question]) -> tuple[tuple[Tensor, ...], list[int]]:
        return self.words.encode([record.question for record in records]), [1] * len(records)

    def answer(
        self, model: Any, records: Sequence[Question], images: Tensor, texts: tuple[Tensor, ...]
    ) -> list[dict[str, Any]]:
        if self.answers:
            best, _ = model.rank(images[:, 0], *texts, *(one.to(images.device) for one in self.choice))
            said = [self.answers[place] for place in best[:, 0].tolist()]
        else:
            said = self.words.decode(model.generate(images[:, 0], *texts))
        return [
            {
                "id": record.id,
                "given": record.given,
                "answer": one,
                "answers": list(record.answers),
                "together": record.together,
            }
            for one, record in zip(said, records, strict=True)
        ]

    def score(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        people = [row for row in rows if len(row["answers"]) > 1 and not row["together"]]
        sets = [metrics.answer_sets(row["answer"], row["answers"]) for row in rows if row["together"]]
        found = [metrics.vqa_accuracy(row["answer"], row["answers"]) for row in people]
        scores = {"vqa_accuracy": sum(found) / len(found)} if found else {}
        return scores | {name: sum(one[name] for one in sets) / len(sets) for name in (sets[0] if sets else ())}

    def results(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """VQA's form: `question_id`, as it was given, and `answer`, of each question."""
        return [{"question_id": _question_id(row), "answer": row["answer"]} for row in rows]


def _question_id(row: Mapping[str, Any]) -> str | int | float:
    """As the annotations have it; the question's place in them where they have none."""
    given = row.get("given")
    return number(row["id"]) if given is None else given
