# Sourced by scripts/demo.
#
# side_by_side COMMAND NAME...: runs `COMMAND NAME` for all names at once and shows what each one
# writes, as it comes, in columns on a terminal; elsewhere one block after the other, at the end.
# The name "" stands for the base model. Fails when a command does.

# wrap WIDTH TEXT: into the array `lines`, at spaces where there are any. Characters from U+1100 on
# are taken as two columns wide: true of emoji, and never too little. `narrow` matches the others.
wrap() {
  local width=$1 text=${2//$'\r'/} word line="" used=0 paragraph
  lines=()
  while IFS= read -r paragraph; do
    line="" used=0
    for word in $paragraph; do
      local wide=${word//$narrow/}
      local columns=$((${#word} + ${#wide}))
      while ((columns > width)); do  # a word longer than the column
        if ((used)); then lines+=("$line") && line="" used=0; fi
        lines+=("${word:0:width/2}")
        word=${word:width/2} wide=${word//$narrow/}
        columns=$((${#word} + ${#wide}))
      done
      if ((used && used + 1 + columns > width)); then lines+=("$line") && line="" used=0; fi
      if ((used)); then line+=" " used=$((used + 1)); fi
      line+=$word used=$((used + columns))
    done
    lines+=("$line")
  done <<<"$text"
}

# draw_band FIRST COUNT MOST: the columns FIRST, FIRST+1, ... under each other's heads, MOST lines.
draw_band() {
  local first=$1 count=$2 most=$3 i row height=0 at
  local -a cells=()
  for ((i = 0; i < count; ++i)); do
    wrap "$column" "$(<"$scratch/$((first + i))")"
    ((${#lines[@]} > height)) && height=${#lines[@]}
    for row in "${!lines[@]}"; do cells[row * 64 + i]=${lines[row]}; done
  done
  ((height > most)) && height=$most
  for ((i = 0; i < count; ++i)); do
    printf '\e[%dG\e[1m%s\e[0m' $((i * (column + 2) + 1)) "${titles[first + i]}"
  done
  printf '\e[K\n'
  for ((row = 0; row < height; ++row)); do
    printf '\e[2K'
    for ((i = 0; i < count; ++i)); do
      at=$((i * (column + 2) + 1))
      printf '\e[%dG%s' "$at" "${cells[row * 64 + i]:-}"
    done
    printf '\n'
  done
  printf '\e[2K\n'
  drawn=$((drawn + height + 2))
}

# draw MOST: all bands over those drawn before, each of MOST lines at most.
draw() {
  local first count frame
  ((drawn)) && printf '\e[%dA\r' "$drawn"
  drawn=0
  for ((first = 0; first < ${#titles[@]}; first += columns)); do
    count=$((${#titles[@]} - first))
    ((count > columns)) && count=$columns
    draw_band "$first" "$count" "$1"
  done
  printf '\e[J'
}

side_by_side() {
  local command=$1 name pid i failed=0 running=1 drawn=0
  shift
  local -a titles=() pids=() lines=()
  local LC_ALL=C.UTF-8 scratch rows=24 width=80 narrow
  printf -v narrow '[\001-\u10ff]'  # $'\u10ff' would be read before LC_ALL is set
  scratch=$(mktemp -d)
  for name in "$@"; do
    : >"$scratch/${#pids[@]}"
    "$command" "$name" >"$scratch/${#pids[@]}" 2>&1 &
    pids+=("$!") titles+=("${name:-the base model}")
  done
  if [[ -t 1 ]]; then
    read -r rows width < <(stty size </dev/tty 2>/dev/null || echo 24 80)
    ((rows)) || rows=24  # a terminal may not know its size
    ((width >= 40)) || width=80
    # Columns of 24 or more, as even as can be.
    local fit=$(((width + 1) / 26)) bands
    ((fit)) || fit=1
    bands=$(((${#titles[@]} + fit - 1) / fit))
    local columns=$(((${#titles[@]} + bands - 1) / bands))
    local column=$(((width - 1) / columns - 2)) most=$(((rows - 1) / bands - 2))
    ((most > 2)) || most=2
    while ((running)); do
      running=0
      for pid in "${pids[@]}"; do kill -0 "$pid" 2>/dev/null && running=1; done
      draw "$most"
      ((running)) && sleep 0.05
    done
    draw 1000  # nothing is drawn over these: they may scroll
  fi
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  if [[ ! -t 1 ]]; then
    for i in "${!titles[@]}"; do printf -- '--- %s\n%s\n\n' "${titles[i]}" "$(<"$scratch/$i")"; done
  fi
  rm -rf "$scratch"
  return "$failed"
}
