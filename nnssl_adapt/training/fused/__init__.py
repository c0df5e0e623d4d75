"""What is computed in one go on a GPU, where torch has one operation after the other?"""
