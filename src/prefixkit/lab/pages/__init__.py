"""What people read: measures and facts in words, tables that compare, plots, and the HTML around them."""
