"""Outer products of small heads and vector-matrix products with them: around H3's memory."""

from based.ops.outer_product.operator import outer_product, vector_matrix_product

__all__ = ["outer_product", "vector_matrix_product"]
