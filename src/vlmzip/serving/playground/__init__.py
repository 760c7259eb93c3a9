"""The playground: a page of the server that asks about an image or a clip with several methods, side by side.

`examples` what the page offers to begin with · `choices` the methods that work on the model · `question` from the
form to model inputs · `answering` one answer, with its costs · `cards` the results as HTML · `page` the form and its
events (Gradio) · `guard` the requests that the page may send · `mount` puts it on a server.
"""
