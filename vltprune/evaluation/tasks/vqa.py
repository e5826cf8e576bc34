"""Visual question answering: VQAv2, Visual Genome, DAQUAR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ...data import Question, answer_list, vqa
from ...data.annotations import parse_question
from ...models.wordpiece import clean_question
from ...registry import tasks
from .. import metrics
from ..results_log import Row
from .base import DEFAULTS, LONGEST, Images, Options, Tokenizer, dense, number, tokenizer_for


class AnswersQuestions(Protocol):
    """A model that this task runs, on images [batch, 3, height, width] and a question's text inputs, [batch, length] each."""

    def rank(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        /,
    ) -> tuple[Tensor, Tensor]:
        """Rank a list of answers for each question.

        Args:
            images: [batch, 3, height, width].
            input_ids: The questions, [batch, length].
            attention_mask: [batch, length], nonzero where a token is real.
            answer_ids: The answers, [answers, length]; one list for all questions.
            answer_mask: [answers, length], nonzero where a token is real.

        Returns:
            The indices of the best answers, best first, and their scores, both [batch, k].
        """
        ...

    def generate(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, /) -> Tensor:
        """Generate an answer to each question.

        Args:
            images: [batch, 3, height, width].
            input_ids: The questions, [batch, length].
            attention_mask: [batch, length], nonzero where a token is real.

        Returns:
            The input_ids of the answers, [batch, answer length].
        """
        ...


@tasks.register("vqa")
@dataclass(frozen=True)
class Vqa:
    """Answers ranked from a list, as in BLIP, or generated, for models that have `rank` and `generate` (`BlipVqa`).

    Scores are VQA accuracy where several people answered, and exact match and overlap where the answers form a set. Withheld
    answers give no score; `submission` is what VQA's server scores.

    Attributes:
        tokenizer: The tokenizer of questions.
        answer_tokenizer: The tokenizer of answers.
        answers: The answers to rank; empty to generate answers.
        answer_inputs: Their input_ids and attention_mask, both [answers, length].
    """

    tokenizer: Tokenizer
    answer_tokenizer: Tokenizer
    answers: tuple[str, ...] = ()
    answer_inputs: tuple[Tensor, ...] = ()

    @staticmethod
    def load_records(data: str, images: Images, strict: bool = False) -> Sequence[Question]:
        return vqa(data, images, strict=strict)

    parse_entry = staticmethod(parse_question)

    @classmethod
    def from_model(cls, model: nn.Module, options: Options = DEFAULTS) -> Vqa:
        host = dense(model)
        if not (hasattr(host, "rank") and hasattr(host, "generate")):
            raise ValueError(f"vqa asks for answers, and a {type(host).__name__} gives none: use a blip_vqa")
        tokenizer = tokenizer_for(host, host.text, options, clean_question, max_length=LONGEST)
        answer_tokenizer = tokenizer_for(host, host.text, options, str)
        if options.answers is None:
            return cls(tokenizer, answer_tokenizer)
        answers = answer_list(options.answers)
        return cls(tokenizer, answer_tokenizer, answers, answer_tokenizer.encode(answers))

    def tokenize(self, records: Sequence[Question]) -> tuple[tuple[Tensor, ...], list[int]]:
        return self.tokenizer.encode([record.question for record in records]), [1] * len(records)

    def predict(
        self, model: AnswersQuestions, records: Sequence[Question], images: Tensor, texts: tuple[Tensor, ...]
    ) -> list[Row]:
        if self.answers:
            best, _ = model.rank(images[:, 0], *texts, *(one.to(images.device) for one in self.answer_inputs))
            predictions = [self.answers[index] for index in best[:, 0].tolist()]
        else:
            predictions = self.tokenizer.decode(model.generate(images[:, 0], *texts))
        return [
            {
                "id": record.id,
                "original_id": record.original_id,
                "answer": prediction,
                "answers": list(record.answers),
                "is_answer_set": record.is_answer_set,
            }
            for prediction, record in zip(predictions, records, strict=True)
        ]

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        people = [row for row in rows if len(row["answers"]) > 1 and not row["is_answer_set"]]
        sets = [metrics.answer_sets(row["answer"], row["answers"]) for row in rows if row["is_answer_set"]]
        found = [metrics.vqa_accuracy(row["answer"], row["answers"]) for row in people]
        scores = {"vqa_accuracy": sum(found) / len(found)} if found else {}
        return scores | {name: sum(one[name] for one in sets) / len(sets) for name in (sets[0] if sets else ())}

    def submission(self, rows: Sequence[Row]) -> list[dict[str, object]]:
        """VQA's results format: `question_id`, as the annotations have it, and `answer`, of each question."""
        return [{"question_id": _question_id(row), "answer": row["answer"]} for row in rows]


def _question_id(row: Row) -> str | int | float:
    """The identifier of the annotations; without one, the question's index in them."""
    original_id = row.get("original_id")
    return number(row["id"]) if original_id is None else original_id
