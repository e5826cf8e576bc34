"""Parts as typed functions, which an IDE completes: vltprune.keep.ratio(0.5) is what "ratio(0.5)" says in short."""
