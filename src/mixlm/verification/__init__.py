"""The statistical proof that every strategy samples its distribution."""
