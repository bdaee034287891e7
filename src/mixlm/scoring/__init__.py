"""How likely given texts are: under each member, and under the ensemble in each unit."""
