"""What an optimizer keeps of the weights, as far as memory and time depend on it: fp32, unless it is said."""

from typing import Literal

from pydantic import NonNegativeFloat

from profiles.record import NonNegativeInt, Record


class OptimizerState(Record):
    """Numbers of tensors that are kept of each weight. The defaults are AdamW's with fp32 masters."""

    of_matrices: NonNegativeInt = 2
    """fp32 tensors with the shape of a matrix inside the layers."""
    of_embeddings: NonNegativeInt = 2
    """fp32 tensors with the shape of an embedding or of the output layer."""
    of_vectors: NonNegativeInt = 2
    """fp32 tensors with the shape of a norm or of a bias."""
    of_rows_and_columns: bool = False
    """Whether a matrix has one number for each row and one for each column (Adafactor)."""
    masters: bool = True
    """Whether a weight that is not fp32 has an fp32 copy, which is what the optimizer updates."""
    bytes_of_number: Literal[2, 4] = 4
    """Bytes of each number that is kept beside the master: 2 if moments are bf16."""

    scratch_of_matrices: NonNegativeFloat = 0.0
    """fp32 tensors with the shape of a matrix inside the layers that its update makes and frees again, beside fp32
    copies of the weight and the gradient, which are made of those that are bf16."""
    scratch_of_others: NonNegativeFloat = 0.0
    """Likewise of an embedding or of the output layer."""

    @property
    def update_bytes(self) -> float:
        """Bytes read and written for a weight of a matrix in an update: the weight and what is kept of it, both ways,
        and the gradient; Adafactor's passes over the gradient for the means of rows and columns are two more."""
        weight = 4 if self.masters else 2
        return 2 * (weight + self.bytes_of_number * self.of_matrices) + 4 + 8 * self.of_rows_and_columns

    @property
    def in_words(self) -> str:
        """For people: `the optimizer keeps 2 fp32 tensors of a matrix`."""
        if self.of_rows_and_columns:
            return "the optimizer keeps means of a matrix's rows and columns"
        precision = "fp32" if self.bytes_of_number == 4 else "bf16"
        kept = f"{self.of_matrices} {precision} tensors" if self.of_matrices else "nothing"
        return f"the optimizer keeps {kept} of a matrix"
