"""What the editor is compared with."""
