//! What each token id contributes to decoded text, worked out once from the tokenizer's decoder.
//!
//! A stream of tokens can then be turned into text without asking the tokenizer again, and without
//! decoding the whole sequence anew for every token.

use std::collections::HashMap;

use serde_json::Value as Json;
use tokenizers::Tokenizer;

pub const EXISTS: u8 = 1;
pub const SPECIAL: u8 = 2;
pub const BYTE: u8 = 4;

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Join {
    Bytes = 0,
    ByteFallback = 1,
}

/// The decoder, reduced to what it does to one token and to the start of the text.
#[derive(Debug)]
pub struct Rule {
    pub join: Join,
    replacements: Vec<(String, String)>,
    pub strip_char: char,
    pub strip_max: u32,
}

pub struct Pieces {
    pub bytes: Vec<u8>,
    pub begin: Vec<u32>,
    pub flags: Vec<u8>,
    pub rule: Rule,
}

impl Pieces {
    pub fn of(tokenizer: &Tokenizer) -> Result<Self, String> {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).map_err(|e| e.to_string())?;
        let rule = Rule::of(&decoder)?;
        let added = tokenizer.get_added_vocabulary();
        let count = tokenizer.get_vocab(true).values().max().map_or(0, |max| max + 1);

        let byte_of_char = byte_level_alphabet();
        let mut pieces = Pieces {
            bytes: Vec::new(),
            begin: vec![0],
            flags: Vec::with_capacity(count as usize),
            rule,
        };
        for id in 0..count {
            // An added token decodes as its normalised form; a model token as it is written.
            let token = added.simple_id_to_token(id).or_else(|| tokenizer.id_to_token(id));
            let mut flags = 0;
            if let Some(token) = token {
                flags = EXISTS | if added.is_special_token(&token) { SPECIAL } else { 0 };
                flags |= pieces.rule.append(&token, &byte_of_char, &mut pieces.bytes);
            }
            pieces.flags.push(flags);
            let end = u32::try_from(pieces.bytes.len());
            pieces.begin.push(end.map_err(|_| "the vocabulary is larger than 4 GiB".to_string())?);
        }
        Ok(pieces)
    }
}

impl Rule {
    fn of(decoder: &Json) -> Result<Self, String> {
        let steps = match decoder["type"].as_str() {
            Some("Sequence") => decoder["decoders"].as_array().cloned().unwrap_or_default(),
            _ => vec![decoder.clone()],
        };
        let mut rule =
            Rule { join: Join::ByteFallback, replacements: vec![], strip_char: ' ', strip_max: 0 };
        // Whether the tokens have become bytes, and whether they have become one text: a step that
        // comes too late would not act on single tokens any more.
        let (mut bytes_done, mut fused) = (false, false);
        for step in &steps {
            match step["type"].as_str() {
                Some("ByteLevel") if steps.len() == 1 => rule.join = Join::Bytes,
                Some("Replace") if !bytes_done && !fused => {
                    let (from, to) = (step["pattern"]["String"].as_str(), step["content"].as_str());
                    let (Some(from), Some(to)) = (from, to) else { return unsupported(decoder) };
                    rule.replacements.push((from.into(), to.into()));
                }
                Some("ByteFallback") if !bytes_done && !fused => bytes_done = true,
                Some("Fuse") => fused = true,
                Some("Strip") if fused && rule.strip_max == 0 && step["stop"] == 0 => {
                    let content = step["content"].as_str().and_then(|s| s.chars().next());
                    let (Some(content), Some(start)) = (content, step["start"].as_u64()) else {
                        return unsupported(decoder);
                    };
                    rule.strip_char = content;
                    rule.strip_max = start as u32;
                }
                _ => return unsupported(decoder),
            }
        }
        // Without ByteFallback a token such as <0x0A> is plain text.
        if rule.join == Join::ByteFallback && !bytes_done {
            return unsupported(decoder);
        }
        Ok(rule)
    }

    /// Appends the piece of `token`; returns BYTE where it is a byte-fallback token.
    fn append(&self, token: &str, byte_of_char: &HashMap<char, u8>, out: &mut Vec<u8>) -> u8 {
        if self.join == Join::Bytes {
            let bytes: Option<Vec<u8>> =
                token.chars().map(|c| byte_of_char.get(&c).copied()).collect();
            match bytes {
                Some(bytes) => out.extend(bytes),
                None => out.extend(token.as_bytes()),
            }
            return 0;
        }
        let mut text = token.to_string();
        for (from, to) in &self.replacements {
            text = text.replace(from, to);
        }
        if text.len() == 6 && text.starts_with("<0x") && text.ends_with('>') {
            if let Ok(byte) = u8::from_str_radix(&text[3..5], 16) {
                out.push(byte);
                return BYTE;
            }
        }
        out.extend(text.as_bytes());
        0
    }
}

fn unsupported(decoder: &Json) -> Result<Rule, String> {
    let mut shown = decoder.to_string();
    if shown.len() > 300 {
        let end = (0..=300).rev().find(|i| shown.is_char_boundary(*i)).unwrap_or(0);
        shown.truncate(end);
        shown.push_str("...");
    }
    Err(format!(
        "the tokenizer's decoder is of an unsupported kind: {shown}; supported are ByteLevel, and \
         a Sequence of Replace, ByteFallback, Fuse and Strip in this order"
    ))
}

/// GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for the code
/// points from 256 on, in order.
fn byte_level_alphabet() -> HashMap<char, u8> {
    let mut next = 256u32;
    (0..=255u8)
        .map(|byte| {
            let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let code = if printable { u32::from(byte) } else { next };
            next += u32::from(!printable);
            (char::from_u32(code).expect("below the surrogates"), byte)
        })
        .collect()
}
