// The element is drawn anew after each change of `props.value`, so listeners are on `element`, which stays.
const read = (file) => {
  const trouble = element.querySelector('.trouble');
  if (file.size > props.most_bytes) {
    trouble.textContent = `${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MB; at most `
      + `${(props.most_bytes / 2 ** 20).toFixed(1)} MB are allowed`;
    return;
  }
  const reader = new FileReader();
  reader.onload = () => { props.value = reader.result; trigger('change'); };
  reader.onerror = () => { trouble.textContent = `${file.name} cannot be read`; };
  reader.readAsDataURL(file);
};
element.addEventListener('change', (event) => {
  if (event.target.type === 'file' && event.target.files.length) read(event.target.files[0]);
});
element.addEventListener('dragover', (event) => {
  event.preventDefault();
  element.querySelector('.drop').classList.add('over');
});
element.addEventListener('dragleave', () => element.querySelector('.drop').classList.remove('over'));
element.addEventListener('drop', (event) => {
  event.preventDefault();
  element.querySelector('.drop').classList.remove('over');
  if (event.dataTransfer.files.length) read(event.dataTransfer.files[0]);
});
element.addEventListener('click', (event) => {
  const button = event.target.closest('.examples button');
  if (!button) return;
  const index = Number(button.dataset.index);
  props.value = props.examples[index].url;
  trigger('select', { index });
});
