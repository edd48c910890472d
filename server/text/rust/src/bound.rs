//! How much text a token can stand for, so that a text that is too long for a number of tokens is
//! known without counting them.

use serde_json::Value as Json;
use tokenizers::{ModelWrapper, Tokenizer};

use crate::pieces::{Join, Pieces};

/// Unicode composes at most so many bytes into one.
const COMPOSING: u32 = 4;

/// The most bytes of a text that become one token. None: any number may, as where white space is
/// dropped or unknown characters are one token.
pub fn longest_token(tokenizer: &Tokenizer, pieces: &Pieces) -> Option<u32> {
    let normalizer = serde_json::to_value(tokenizer.get_normalizer()).ok()?;
    let pre_tokenizer = serde_json::to_value(tokenizer.get_pre_tokenizer()).ok()?;
    let shrinking = shrinking(&normalizer)?;
    let strips = |token: &tokenizers::AddedToken| token.lstrip || token.rstrip;
    if !keeps_all(&pre_tokenizer)
        || !knows_all(tokenizer, pieces.rule.join)
        || tokenizer.get_added_tokens_decoder().values().any(strips)
    {
        return None;
    }
    let longest = pieces.begin.windows(2).map(|ends| ends[1] - ends[0]).max()?;
    longest.checked_mul(shrinking)
}

fn steps<'a>(part: &'a Json, list: &str) -> &'a [Json] {
    match part[list].as_array() {
        Some(steps) => steps,
        None => std::slice::from_ref(part),
    }
}

/// How many bytes a normaliser makes one of at most.
fn shrinking(normalizer: &Json) -> Option<u32> {
    let mut most = 1;
    for step in steps(normalizer, "normalizers") {
        match step["type"].as_str() {
            None | Some("Prepend") => {}
            Some("NFC") => most = COMPOSING,
            Some("Replace") => {
                let (from, to) = (step["pattern"]["String"].as_str()?, step["content"].as_str()?);
                if to.len() < from.len() {
                    return None;
                }
            }
            _ => return None,
        }
    }
    Some(most)
}

/// Whether every character of a text is in one of the parts that it is cut into.
fn keeps_all(pre_tokenizer: &Json) -> bool {
    steps(pre_tokenizer, "pretokenizers").iter().all(|step| match step["type"].as_str() {
        None | Some("ByteLevel" | "Digits" | "Metaspace") => true,
        Some("Split") => step["behavior"] != "Removed",
        _ => false,
    })
}

/// Whether there is a token for every byte, so that none is left out or unknown. Vocabularies of bytes
/// lack some control characters at most, of which no text is made.
fn knows_all(tokenizer: &Tokenizer, join: Join) -> bool {
    let ModelWrapper::BPE(model) = tokenizer.get_model() else { return false };
    let has = |byte| tokenizer.token_to_id(&format!("<0x{byte:02X}>")).is_some();
    join == Join::Bytes || (model.byte_fallback && (0..256).all(has))
}
