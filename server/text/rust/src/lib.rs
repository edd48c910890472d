//! The C interface declared in lorikeet_text.h. Contracts are stated there; this file only moves
//! bytes across the boundary and keeps panics on this side of it.

mod bound;
mod chat;
mod grammar;
mod pieces;
mod python;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::str::FromStr;

use chat::ChatTemplate;
use grammar::Grammars;
use llguidance::Matcher;
use pieces::Pieces;
use tokenizers::Tokenizer;

type Result<T> = std::result::Result<T, String>;

#[repr(C)]
pub struct LkBytes {
    data: *mut u8,
    size: usize,
    capacity: usize,
}

impl LkBytes {
    fn new(bytes: Vec<u8>) -> Self {
        let mut bytes = std::mem::ManuallyDrop::new(bytes);
        LkBytes { data: bytes.as_mut_ptr(), size: bytes.len(), capacity: bytes.capacity() }
    }
}

#[repr(C)]
pub struct LkIds {
    data: *mut u32,
    size: usize,
    capacity: usize,
}

impl LkIds {
    fn new(ids: Vec<u32>) -> Self {
        let mut ids = std::mem::ManuallyDrop::new(ids);
        LkIds { data: ids.as_mut_ptr(), size: ids.len(), capacity: ids.capacity() }
    }
}

#[no_mangle]
pub unsafe extern "C" fn lk_bytes_free(bytes: LkBytes) {
    if !bytes.data.is_null() {
        drop(Vec::from_raw_parts(bytes.data, bytes.size, bytes.capacity));
    }
}

#[no_mangle]
pub unsafe extern "C" fn lk_ids_free(ids: LkIds) {
    if !ids.data.is_null() {
        drop(Vec::from_raw_parts(ids.data, ids.size, ids.capacity));
    }
}

/// Runs `body`; its value goes to `*out`, its error or panic to `*error`.
unsafe fn guard<T>(out: *mut T, error: *mut LkBytes, body: impl FnOnce() -> Result<T>) -> bool {
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(format!("internal error in the text library: {what}"))
    });
    match result {
        Ok(value) => {
            out.write(value);
            true
        }
        Err(message) => {
            error.write(LkBytes::new(message.into_bytes()));
            false
        }
    }
}

unsafe fn slice<'a, T>(data: *const T, size: usize) -> &'a [T] {
    if size == 0 {
        &[]
    } else {
        std::slice::from_raw_parts(data, size)
    }
}

fn utf8<'a>(bytes: &'a [u8], what: &str) -> Result<&'a str> {
    std::str::from_utf8(bytes)
        .map_err(|e| format!("{what} is not valid UTF-8 at byte {}", e.valid_up_to()))
}

#[no_mangle]
pub unsafe extern "C" fn lk_tokenizer_create(
    json: *const u8,
    json_size: usize,
    out: *mut *mut Tokenizer,
    error: *mut LkBytes,
) -> bool {
    guard(out, error, || {
        let json = utf8(slice(json, json_size), "tokenizer.json")?;
        let mut tokenizer = Tokenizer::from_str(json).map_err(|e| e.to_string())?;
        tokenizer.with_padding(None).with_truncation(None).map_err(|e| e.to_string())?;
        Ok(Box::into_raw(Box::new(tokenizer)))
    })
}

#[no_mangle]
pub unsafe extern "C" fn lk_tokenizer_free(tokenizer: *mut Tokenizer) {
    if !tokenizer.is_null() {
        drop(Box::from_raw(tokenizer));
    }
}

#[no_mangle]
pub unsafe extern "C" fn lk_tokenizer_encode(
    tokenizer: *const Tokenizer,
    text: *const u8,
    text_size: usize,
    add_special: bool,
    ids: *mut LkIds,
    error: *mut LkBytes,
) -> bool {
    guard(ids, error, || {
        let text = utf8(slice(text, text_size), "text")?;
        let encoding = (*tokenizer).encode_fast(text, add_special).map_err(|e| e.to_string())?;
        Ok(LkIds::new(encoding.get_ids().to_vec()))
    })
}

#[no_mangle]
pub unsafe extern "C" fn lk_tokenizer_decode(
    tokenizer: *const Tokenizer,
    ids: *const u32,
    ids_size: usize,
    skip_special: bool,
    text: *mut LkBytes,
    error: *mut LkBytes,
) -> bool {
    guard(text, error, || {
        let text = (*tokenizer).decode(slice(ids, ids_size), skip_special);
        Ok(LkBytes::new(text.map_err(|e| e.to_string())?.into_bytes()))
    })
}

#[no_mangle]
pub unsafe extern "C" fn lk_tokenizer_token_to_id(
    tokenizer: *const Tokenizer,
    token: *const u8,
    token_size: usize,
) -> i64 {
    let id = catch_unwind(AssertUnwindSafe(|| {
        let token = std::str::from_utf8(slice(token, token_size)).ok()?;
        (*tokenizer).token_to_id(token)
    }));
    id.ok().flatten().map_or(-1, i64::from)
}

#[no_mangle]
pub unsafe extern "C" fn lk_tokenizer_id_to_token(
    tokenizer: *const Tokenizer,
    id: u32,
    token: *mut LkBytes,
) -> bool {
    match catch_unwind(AssertUnwindSafe(|| (*tokenizer).id_to_token(id))) {
        Ok(Some(found)) => {
            token.write(LkBytes::new(found.into_bytes()));
            true
        }
        _ => false,
    }
}

#[repr(C)]
pub struct LkPieces {
    bytes: LkBytes,
    begin: LkIds,
    flags: LkBytes,
    join: u32,
    strip_char: u32,
    strip_max: u32,
    longest: u32,
}

#[no_mangle]
pub unsafe extern "C" fn lk_tokenizer_pieces(
    tokenizer: *const Tokenizer,
    out: *mut LkPieces,
    error: *mut LkBytes,
) -> bool {
    guard(out, error, || {
        let pieces = Pieces::of(&*tokenizer)?;
        let longest = bound::longest_token(&*tokenizer, &pieces).unwrap_or(0);
        Ok(LkPieces {
            bytes: LkBytes::new(pieces.bytes),
            begin: LkIds::new(pieces.begin),
            flags: LkBytes::new(pieces.flags),
            join: pieces.rule.join as u32,
            strip_char: pieces.rule.strip_char as u32,
            strip_max: pieces.rule.strip_max,
            longest,
        })
    })
}

#[no_mangle]
pub unsafe extern "C" fn lk_pieces_free(pieces: LkPieces) {
    lk_bytes_free(pieces.bytes);
    lk_ids_free(pieces.begin);
    lk_bytes_free(pieces.flags);
}

#[no_mangle]
pub unsafe extern "C" fn lk_chat_template_create(
    source: *const u8,
    source_size: usize,
    out: *mut *mut ChatTemplate,
    error: *mut LkBytes,
) -> bool {
    guard(out, error, || {
        let source = utf8(slice(source, source_size), "chat template")?;
        Ok(Box::into_raw(Box::new(ChatTemplate::new(source)?)))
    })
}

#[no_mangle]
pub unsafe extern "C" fn lk_chat_template_free(chat_template: *mut ChatTemplate) {
    if !chat_template.is_null() {
        drop(Box::from_raw(chat_template));
    }
}

#[repr(C)]
pub struct LkVariable {
    name: *const u8,
    name_size: usize,
    json: *const u8,
    json_size: usize,
}

#[no_mangle]
pub unsafe extern "C" fn lk_chat_template_render(
    chat_template: *const ChatTemplate,
    variables: *const LkVariable,
    variables_size: usize,
    now_unix_s: i64,
    text: *mut LkBytes,
    error: *mut LkBytes,
) -> bool {
    guard(text, error, || {
        let mut named = Vec::new();
        for variable in slice(variables, variables_size) {
            let name = utf8(slice(variable.name, variable.name_size), "variable name")?;
            named.push((name, utf8(slice(variable.json, variable.json_size), name)?));
        }
        Ok(LkBytes::new((*chat_template).render(&named, now_unix_s)?.into_bytes()))
    })
}

/// `begin`: [flags_size + 1] piece i is bytes[begin[i], begin[i + 1]).
#[no_mangle]
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C" fn lk_grammars_create(
    bytes: *const u8,
    begin: *const u32,
    flags: *const u8,
    flags_size: usize,
    vocab: usize,
    end_ids: *const u32,
    end_ids_size: usize,
    out: *mut *mut Grammars,
    error: *mut LkBytes,
) -> bool {
    guard(out, error, || {
        let begin = slice(begin, flags_size + 1);
        let bytes = slice(bytes, begin[flags_size] as usize);
        let pieces: Vec<&[u8]> =
            begin.windows(2).map(|ends| &bytes[ends[0] as usize..ends[1] as usize]).collect();
        let flags = slice(flags, flags_size);
        let grammars = Grammars::new(&pieces, flags, vocab, slice(end_ids, end_ids_size))?;
        Ok(Box::into_raw(Box::new(grammars)))
    })
}

#[no_mangle]
pub unsafe extern "C" fn lk_grammars_free(grammars: *mut Grammars) {
    if !grammars.is_null() {
        drop(Box::from_raw(grammars));
    }
}

#[no_mangle]
pub unsafe extern "C" fn lk_matcher_create(
    grammars: *const Grammars,
    kind: *const u8,
    kind_size: usize,
    text: *const u8,
    text_size: usize,
    out: *mut *mut Matcher,
    error: *mut LkBytes,
) -> bool {
    guard(out, error, || {
        let kind = utf8(slice(kind, kind_size), "kind")?;
        let text = utf8(slice(text, text_size), kind)?;
        Ok(Box::into_raw(Box::new((*grammars).matcher(kind, text)?)))
    })
}

#[no_mangle]
pub unsafe extern "C" fn lk_matcher_clone(matcher: *const Matcher) -> *mut Matcher {
    Box::into_raw(Box::new((*matcher).deep_clone()))
}

#[no_mangle]
pub unsafe extern "C" fn lk_matcher_free(matcher: *mut Matcher) {
    if !matcher.is_null() {
        drop(Box::from_raw(matcher));
    }
}

#[no_mangle]
pub unsafe extern "C" fn lk_matcher_mask(
    matcher: *mut Matcher,
    allowed: *mut u32,
    allowed_size: usize,
    error: *mut LkBytes,
) -> bool {
    let mut done = ();
    guard(&mut done, error, || {
        grammar::mask(&mut *matcher, std::slice::from_raw_parts_mut(allowed, allowed_size))
    })
}

#[no_mangle]
pub unsafe extern "C" fn lk_matcher_accept(
    matcher: *mut Matcher,
    token: u32,
    error: *mut LkBytes,
) -> bool {
    let mut done = ();
    guard(&mut done, error, || (*matcher).consume_token(token).map_err(|e| e.to_string()))
}

#[no_mangle]
pub unsafe extern "C" fn lk_matcher_stopped(matcher: *const Matcher) -> bool {
    (*matcher).is_stopped()
}
