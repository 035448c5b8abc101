"""How much attention a trained prefix gets: measured, summed up, told in words, drawn."""
